"""Attention engines: every layout, mask and table of documents equals one process; what each receives is its formula."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longhaul.models.errors import UserError
from longhaul.models.ops.attention import Mask, Piece
from longhaul.models.ops.attention.naive import visible as seen_by_pieces
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import WholeSequence
from longhaul.parallel.attention.heads import HeadSplit
from longhaul.parallel.attention.pieces import by_document, coordinates, held_by, needs, past_runs, seen, visible
from longhaul.parallel.attention.registry import ENGINES, make_attention
from longhaul.parallel.attention.ring import output_of
from longhaul.parallel.attention.usp import Usp
from longhaul.parallel.comm import Comm
from longhaul.parallel.engine import SequenceParallel
from longhaul.parallel.layout import LAYOUTS, SequenceLayout
from tests.harness.cases import document_tables
from tests.harness.numerics import TOLERANCE, assert_close
from tests.harness.pool import run_ranks

from .attention_ranks import MASKS, WIDTHS, Case, attend, exactness, make_engine, make_inputs, make_shard, traffic, under_autocast

T = 29
BOTH = sum(WIDTHS)
FLOAT32 = 4

# Options, and one cell in how many is run.
VARIANTS: dict[str, tuple[dict[str, Any], int]] = {
    "ring": ({}, 5),
    "ring_kv": ({"backward": "kv"}, 8),
    "ring_q": ({"backward": "q"}, 8),
    "all_gather": ({}, 6),
    "all_gather_slices": ({"head_slices": 2}, 8),
    "rsa": ({}, 4),
    "ulysses": ({}, 5),
    "usp": ({}, 6),
}
INNER = {1: 1, 2: 2, 3: 1, 4: 2, 6: 3}


def arguments(variant: str, world_size: int) -> dict[str, Any]:
    options, every = VARIANTS[variant]
    engine = next(name for name in ENGINES if variant.startswith(name))
    if engine == "usp":
        options = {"inner": INNER[world_size]}
    return {"engine": engine, "options": options, "every": every}


def assert_exact(results: list[dict[str, tuple[float, str]]], dtype: torch.dtype) -> None:
    for rank, worst in enumerate(results):
        assert worst.keys() == {"out", "dq", "dk", "dv", "end 0", "end 1", "dpast 0", "dpast 1"}
        for tensor, (value, where) in worst.items():
            assert value <= TOLERANCE[dtype], f"rank {rank}, {tensor}: error {value:.1e} at {where}"


@pytest.mark.parametrize("world_size", (1, 2, 3, 4))
@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_equal_one_process(variant: str, world_size: int) -> None:
    call = arguments(variant, world_size)
    if world_size == 1:
        call["every"] *= 2
    assert_exact(run_ranks(exactness, world_size, num_tokens=T, dtype=torch.float64, timeout=120, **call), torch.float64)


def test_usp_of_two_groups_of_three() -> None:
    call = arguments("usp", 6) | {"every": 20}
    assert_exact(run_ranks(exactness, 6, num_tokens=T, dtype=torch.float64, timeout=120, **call), torch.float64)


@pytest.mark.parametrize("variant", VARIANTS)
def test_single_precision(variant: str) -> None:
    call = arguments(variant, 3) | {"every": 20}
    assert_exact(run_ranks(exactness, 3, num_tokens=64, dtype=torch.float32, timeout=120, **call), torch.float32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_inputs_decide_the_precision(variant: str) -> None:
    call = arguments(variant, 2) | {"every": 20}
    assert_exact(run_ranks(under_autocast, 2, num_tokens=T, dtype=torch.float32, timeout=120, **call), torch.float32)


def mixed(rank: int, world_size: int, engine: str, options: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Values of a lower type than queries and keys."""
    comm, case = Comm(dist.group.WORLD), Case("zigzag", {}, (0, 5, 40), Mask(), (4, 2))
    inputs = make_inputs(case)
    inputs = inputs._replace(v=inputs.v.float())
    shard = make_shard(comm, make_engine(engine, comm, **options), case, inputs.documents)
    rows = list(shard.layout.parts[rank])
    expected = attend(WholeSequence(inputs.documents), inputs._replace(v=inputs.v.double()), case.mask, [(0, 40)])
    found = attend(shard, inputs, case.mask, rows)
    assert found["dv"].dtype == torch.float32 and found["out"].dtype == torch.float64
    return {name: (found[name], torch.cat([expected[name][a:b] for a, b in rows])) for name in found}


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_of_a_lower_type(variant: str) -> None:
    call = arguments(variant, 2)
    for found in run_ranks(mixed, 2, engine=call["engine"], options=call["options"]):
        for name, (actual, reference) in found.items():
            assert_close(actual, reference, name)


def half_precision(rank: int, world_size: int, engine: str, options: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """bfloat16 inputs on ranks, and the same numbers in float64 in one process."""
    comm = Comm(dist.group.WORLD)
    case = Case("zigzag", {}, (0, 5, 64), Mask(), (4, 2))
    inputs = make_inputs(case, torch.bfloat16)
    exact = inputs._replace(**{name: getattr(inputs, name).double() for name in ("q", "k", "v", "dout")})
    shard = make_shard(comm, make_engine(engine, comm, **options), case, inputs.documents)
    rows = list(shard.layout.parts[rank])
    found = attend(shard, inputs, case.mask, rows)
    expected = attend(WholeSequence(inputs.documents), exact, case.mask, [(0, 64)])
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    return {name: (found[name], torch.cat([expected[name][a:b] for a, b in rows])) for name in found}


@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_does_not_add_up_over_hops(variant: str) -> None:
    """Partials are float32, so four ranks round their results once, like one process."""
    call = arguments(variant, 4)
    for found in run_ranks(half_precision, 4, engine=call["engine"], options=call["options"]):
        for name, (actual, reference) in found.items():
            assert_close(actual, reference, name)


# Pieces


def all_layouts(bounds: tuple[int, ...], first_position: int = 0) -> list[tuple[SequenceLayout, Documents]]:
    documents = Documents(bounds, first_position)
    names = [(name, {}) for name in LAYOUTS] + [("striped", {"block": 1}), ("striped", {"block": 2})]
    return [(SequenceLayout.make(name, documents, 3, **options), documents) for name, options in names]


@pytest.mark.parametrize("mask", [*MASKS, Mask(window=1), Mask(window=100), Mask(causal=False, window=9)])
@pytest.mark.parametrize("table", document_tables(T))
def test_pieces_are_the_mask_entry_by_entry(mask: Mask, table: str) -> None:
    for layout, documents in all_layouts(document_tables(T)[table], 6):
        held = [held_by(layout, documents, [rank]) for rank in range(3)]
        held += [held_by(layout, documents, [0, 2]), held_by(layout, documents, [0, 1, 2])]
        runs = [own.runs for own in held] + [past_runs(4)]
        places = [coordinates(own, torch.device("cpu")) for own in runs]
        for queries, keys in itertools.product(range(5), range(6)):
            if keys in (3, 4) and queries not in (keys, 1 if keys == 3 else keys):
                continue  # runs of a group and of one of its members overlap; nobody asks for that
            if queries in (3, 4) and keys not in (queries, 5, 1 if queries == 3 else queries):
                continue
            pieces = visible(runs[queries], runs[keys], mask)
            found = seen_by_pieces(pieces, places[queries][0].numel(), places[keys][0].numel(), mask.window)
            assert torch.equal(found, seen(places[queries], places[keys], mask)), (layout.name, queries, keys)
            assert needs(runs[queries], by_document(runs[keys]), mask) == bool(found.any())
            assert not any(a.q_start < b.q_stop and b.q_start < a.q_stop and a.k_start < b.k_stop and b.k_start < a.k_stop
                           for a, b in itertools.combinations(pieces, 2)), "a key is seen once"


def test_pieces_are_few() -> None:
    """Whole earlier parts are one piece, and stripes of single tokens one causal piece."""
    documents = Documents((0, 96))
    stripes = SequenceLayout.make("striped", documents, 3, block=1)
    runs = [held_by(stripes, documents, [rank]).runs for rank in range(3)]
    assert visible(runs[1], runs[1], Mask()) == [Piece(0, 32, 0, 32, True, 0)]
    assert visible(runs[1], runs[0], Mask()) == [Piece(0, 32, 0, 32, True, 0)]
    assert visible(runs[0], runs[1], Mask()) == [Piece(1, 32, 0, 31, True, 0)]
    zigzag = SequenceLayout.make("zigzag", documents, 3)
    runs = [held_by(zigzag, documents, [rank]).runs for rank in range(3)]
    assert visible(runs[0], runs[0], Mask()) == [Piece(0, 16, 0, 16, True, 0), Piece(16, 32, 0, 32, True, 0)]
    assert visible(runs[0], runs[1], Mask()) == [Piece(16, 32, 0, 32, False, 16)]
    assert len(runs[2]) == 1, "the two middle chunks are neighbours"


# Traffic

CASES = {
    "one": Case("contiguous", {}, (0, 30), Mask(), (4, 2)),
    "uneven": Case("contiguous", {"lengths": (3, 0, 27)}, (0, 10, 30), Mask(), (4, 2)),
    "zigzag": Case("zigzag", {}, (0, 13, 30), Mask(), (4, 4)),
    "both ways": Case("striped", {}, (0, 30), Mask(causal=False), (3, 3)),
    "window": Case("contiguous", {}, (0, 30), Mask(window=4), (4, 2)),
    "local": Case("contiguous", {}, (0, 10, 20, 30), Mask(), (4, 2)),
    "documents": Case("zigzag_per_document", {}, (0, 13, 30), Mask(), (5, 1)),
}


class Facts:
    """Who holds and reads what, from a look at every pair of tokens."""

    def __init__(self, case: Case, ranks: int) -> None:
        layout = SequenceLayout.make(case.layout, Documents(case.bounds), ranks, **case.options)
        total = case.bounds[-1]
        owner = [0] * total
        for rank, own in enumerate(layout.parts):
            for start, stop in own:
                owner[start:stop] = [rank] * (stop - start)
        self.ranks, self.tokens = ranks, [owner.count(rank) for rank in range(ranks)]
        self.needs = set()
        for q, k in itertools.product(range(total), repeat=2):
            together = all((bound <= q) == (bound <= k) for bound in case.bounds)
            late = case.mask.causal and k > q
            if together and not late and (case.mask.window is None or k > q - case.mask.window):
                self.needs.add((owner[q], owner[k]))

    def reach(self, rank: int, moving: str) -> int:
        if moving == "q":
            return max((rank - k) % self.ranks for q, k in {*self.needs, (rank, rank)} if q == rank)
        return max((q - rank) % self.ranks for q, k in {*self.needs, (rank, rank)} if k == rank)

    def visitors(self, rank: int, moving: str, first: int = 1) -> int:
        """Tokens of others whose block comes to `rank`, at hop `first` or later."""
        step = -1 if moving == "q" else 1
        hops = {source: step * (rank - source) % self.ranks for source in range(self.ranks)}
        return sum(self.tokens[s] for s, hop in hops.items() if first <= hop <= self.reach(s, moving))

    def sums(self, rank: int, moving: str) -> int:
        """Tokens of the gradients that come to `rank`: those that it adds to, and its own coming home."""
        home = self.tokens[rank] if self.reach(rank, moving) else 0
        return self.visitors(rank, moving, first=2) + home


def by_label(found: dict[tuple[str, str], int]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for (label, _), size in found.items():
        totals[label] = totals.get(label, 0) + size
    return {label: size for label, size in totals.items() if size}


def nonzero(**sizes: int) -> dict[str, int]:
    return {label.replace("_", " "): size * FLOAT32 for label, size in sizes.items() if size}


@pytest.mark.parametrize("moving", ("kv", "q"))
@pytest.mark.parametrize("name", CASES)
def test_ring_receives_its_formula(name: str, moving: str) -> None:
    case = CASES[name]
    facts, (heads, key_heads) = Facts(case, 3), case.heads
    for rank, found in enumerate(run_ranks(traffic, 3, engine="ring", options={"backward": moving}, case=case)):
        visitors, sums = facts.visitors(rank, moving), facts.sums(rank, moving)
        expected = {"kv_forward": facts.visitors(rank, "kv") * key_heads * BOTH}
        if moving == "kv":
            expected["kv_backward"] = (visitors + sums) * key_heads * BOTH
        else:
            expected["q_backward"] = visitors * heads * (BOTH + 2) + sums * heads * WIDTHS[0]
        assert by_label(found) == nonzero(**expected)


def test_ring_skips_hops_that_nobody_reads() -> None:
    """Contiguous and causal: rank p gets the blocks of the p ranks before it; with a window, of one of them."""
    for name, blocks in (("one", (0, 1, 2)), ("window", (0, 1, 1)), ("local", (0, 0, 0))):
        for rank, found in enumerate(run_ranks(traffic, 3, engine="ring", options={}, case=CASES[name])):
            assert by_label(found).get("kv forward", 0) == blocks[rank] * 10 * 2 * BOTH * FLOAT32


def test_ring_moves_whichever_is_fewer_bytes() -> None:
    """Keys, values and gradients 2 (K + V) Hkv; queries (K + V + 2 + K) H. Equal heads: queries. Grouped: keys."""
    for heads, label in (((4, 4), "q backward"), ((4, 2), "kv backward"), ((6, 2), "kv backward")):
        case = CASES["both ways"]._replace(heads=heads)
        chosen, other = (
            [by_label(found) for found in run_ranks(traffic, 3, engine="ring", options=options, case=case)]
            for options in ({}, {"backward": "kv" if label == "q backward" else "q"})
        )
        assert all(label in found for found in chosen)
        assert sum(sum(found.values()) for found in chosen) < sum(sum(found.values()) for found in other)


@pytest.mark.parametrize("slices", (1, 2, 3))
@pytest.mark.parametrize("name", CASES)
def test_all_gather_receives_its_formula(name: str, slices: int) -> None:
    case = CASES[name]
    facts = Facts(case, 3)
    crosses = any(q != k for q, k in facts.needs)
    size = crosses * 2 * max(facts.tokens) * case.heads[1] * BOTH
    expected = nonzero(kv_forward=size, kv_backward=2 * size)
    for found in run_ranks(traffic, 3, engine="all_gather", options={"head_slices": slices}, case=case):
        assert by_label(found) == expected


@pytest.mark.parametrize("world_size", (2, 3, 4))
@pytest.mark.parametrize("checkpointed", (False, True))
def test_ulysses_receives_its_formula(world_size: int, checkpointed: bool) -> None:
    for heads in ((4, 4), (4, 2), (6, 3), (2, 1), (5, 1)):
        case = Case("zigzag", {}, (0, 13, 30), Mask(), heads)
        facts, split = Facts(case, world_size), HeadSplit(*heads, world_size)
        queries, keys = ([b - a for a, b in ranges] for ranges in split.ranges)
        results = run_ranks(traffic, world_size, engine="ulysses", options={}, case=case, checkpointed=checkpointed)
        K, V = WIDTHS
        for rank, found in enumerate(results):
            own, others = facts.tokens[rank], 30 - facts.tokens[rank]
            forward = others * (queries[rank] * K + keys[rank] * BOTH) + own * (heads[0] - queries[rank]) * V
            backward = others * queries[rank] * V
            backward += own * ((heads[0] - queries[rank]) * K + (sum(keys) - keys[rank]) * BOTH)
            if checkpointed:
                backward += others * (queries[rank] + keys[rank]) * BOTH
            assert by_label(found) == nonzero(heads_forward=forward, heads_backward=backward)


def test_ulysses_on_dividing_ranks_is_the_published_formula() -> None:
    """(2 H + 2 Hkv) n d (P - 1) / P elements each way, for K = V = d."""
    case = Case("contiguous", {}, (0, 32), Mask(), (4, 2))
    d = sum(WIDTHS) / 2
    for found in run_ranks(traffic, 2, engine="ulysses", options={}, case=case):
        forward, backward = by_label(found)["heads forward"], by_label(found)["heads backward"]
        assert forward + backward == 2 * (2 * 4 + 2 * 2) * 16 * d * (1 / 2) * FLOAT32


def test_heads_are_spread_as_evenly_as_they_go() -> None:
    split = HeadSplit(6, 2, 4)
    assert split.ranges == ([(0, 1), (1, 3), (3, 4), (4, 6)], [(0, 1), (0, 1), (1, 2), (1, 2)])
    assert HeadSplit(6, 3, 2).ranges[1] == [(0, 2), (1, 3)] and HeadSplit(6, 3, 2).readers(1) == [0, 1, 1]
    assert HeadSplit(2, 1, 3).ranges == ([(0, 0), (0, 1), (1, 2)], [(0, 0), (0, 1), (0, 1)])


def test_usp_receives_both_formulas() -> None:
    """All-to-all inside the pairs, and a ring of pairs with half the heads."""
    case, (K, V) = Case("contiguous", {}, (0, 32), Mask(causal=False), (4, 2)), WIDTHS
    n, u = 8, 2
    expected = nonzero(
        heads_forward=n * (2 * K + BOTH) + n * 2 * V,
        heads_backward=n * 2 * V + n * (2 * K + BOTH),
        kv_forward=u * n * BOTH,
        kv_backward=2 * u * n * BOTH,
    )
    for found in run_ranks(traffic, 4, engine="usp", options={"inner": 2}, case=case):
        assert by_label(found) == expected


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("world_size", (2, 3, 4))
def test_rsa_receives_the_papers_formula(world_size: int, causal: bool) -> None:
    """2 (P - 1) n D forward and 6 (P - 1) n D backward, where D is Hkv K = Hkv V; here Hkv (K + V) / 2 on average."""
    n = 12
    for layout in ("contiguous", "contiguous_per_document"):
        case = Case(layout, {}, (0, 12, n * world_size), Mask(causal), (3, 3))
        D = 3 * BOTH / 2
        for found in run_ranks(traffic, world_size, engine="rsa", options={}, case=case):
            assert by_label(found) == {
                "kv forward": 2 * (world_size - 1) * n * D * FLOAT32,
                "kv backward": 6 * (world_size - 1) * n * D * FLOAT32,
            }
            assert found["kv backward", "all_reduce"] == 2 * found["kv backward", "p2p"]


def test_rsa_on_uneven_ranks() -> None:
    case = CASES["uneven"]
    for rank, found in enumerate(run_ranks(traffic, 3, engine="rsa", options={}, case=case)):
        ring = (30 - (3, 0, 27)[rank]) * 2 * BOTH
        assert by_label(found) == nonzero(kv_forward=ring, kv_backward=ring + 2 * 2 * 30 * 2 * BOTH // 3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_end_of_a_windowed_stream_is_its_window(variant: str) -> None:
    """Besides what the engine sends: every rank gets the last `window - 1` tokens, and their gradients need no message."""
    call, mask = arguments(variant, 3), Mask(window=4)
    if call["engine"] == "rsa":
        mask = Mask()
    case = Case("contiguous", {}, (0, 27, 30), mask, (4, 2))
    del call["every"]
    without, kept = (run_ranks(traffic, 3, case=case._replace(keep_state=keep), **call) for keep in (False, True))
    for before, after in zip(without, kept):
        assert by_label(after) == by_label(before) | nonzero(kv_state_forward=2 * 3 * 2 * BOTH)


def recomputation(rank: int, world_size: int, engine: str, options: dict[str, Any]) -> dict[str, Any]:
    """With and without a checkpoint: calls by label, and all results; and the labels of the checkpoint's backward."""
    comm, results = Comm(dist.group.WORLD), {}
    served = make_engine(engine, comm, **options)
    case = Case("zigzag", {}, (0, 13, 40), Mask(), (4, 2), 6, True)
    inputs = make_inputs(case)
    for checkpointed in (False, True):
        shard = make_shard(comm, served, case, inputs.documents)
        found = attend(shard, inputs, case.mask, list(shard.layout.parts[rank]), checkpointed)
        calls = {label: count.calls for (label, _), count in comm.ledger.counts.items() if label.endswith("forward")}
        comm.ledger.reset()
        results[checkpointed] = (calls, found)
    return results


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputation_sends_nothing(variant: str) -> None:
    """As many forward calls as without a checkpoint, so none in the recomputation; and the same results."""
    call = arguments(variant, 4)
    for found in run_ranks(recomputation, 4, engine=call["engine"], options=call["options"]):
        assert found[True][0] == found[False][0] and found[True][0]
        for name, value in found[False][1].items():
            assert_close(found[True][1][name], value, name)


def events(rank: int, world_size: int, engine: str, options: dict[str, Any]) -> list[str]:
    comm = Comm(dist.group.WORLD)
    case = Case("zigzag", {}, (0, 30), Mask(), (4, 2))
    inputs = make_inputs(case)
    shard = make_shard(comm, make_engine(engine, comm, **options), case, inputs.documents)
    comm.ledger.events = []
    attend(shard, inputs, case.mask, list(shard.layout.parts[rank]))
    return comm.ledger.events


def test_ring_sends_beside_its_work() -> None:
    """A hop is posted before the work on the block of the hop before it: nothing waits for a message posted just now."""
    for found in run_ranks(events, 3, engine="ring", options={"backward": "kv"}):
        hop = ["wait kv forward", "post kv forward"]
        assert found[:6] == ["post kv forward", "local start", "local end", *hop, "wait kv forward"]
        assert found[6:9] == ["post kv backward", "local start", "local end"]
        assert found[9:11] == ["wait kv backward", "post kv backward"]


def test_head_slices_travel_beside_each_other() -> None:
    for found in run_ranks(events, 3, engine="all_gather", options={"head_slices": 2}):
        forward = ["wait kv forward", "post kv forward", "wait kv forward"]
        assert found[:6] == ["post kv forward", "local start", "local end", *forward]
        backward = ["wait kv backward", "post kv backward"]
        assert found[6:11] == ["post kv backward", "local start", "local end", *backward]


def test_an_output_that_stands_for_a_product() -> None:
    dout, delta = torch.randn(5, 3, 4), torch.randn(5, 3)
    dout[2, 1] = 0.0
    delta[2, 1] = 0.0
    assert_close((dout * output_of(dout, delta)).sum(-1), delta, "product")


# Refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_attention("rign", Comm(None)), "'rign' is no attention engine; did you mean 'ring'"),
        (lambda: make_attention("ring", Comm(None), slices=2), "'ring' has no option 'slices'; it takes backward"),
        (lambda: make_attention("ring", Comm(None), backward="x"), "moves one of auto, kv, q in its backward, not 'x'"),
        (lambda: make_attention("all_gather", Comm(None), head_slices=0), "at least 1 slice, not 0"),
        (lambda: make_attention("usp", Comm(None)), "needs the groups inside and across"),
        (
            lambda: make_attention("rsa", Comm(None)).check(Mask(window=5)),
            "'rsa' .* does not serve the window of 5 tokens; use all_gather, ring, ulysses, usp",
        ),
        (lambda: SequenceParallel(Comm(None), layout="zigzga"), "'zigzga' is no layout; did you mean 'zigzag'"),
    ],
)
def test_refusals(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


def plug_in(rank: int, world_size: int) -> dict[str, str]:
    comm, found = Comm(dist.group.WORLD), {}

    def refusal(name: str, call: Callable[[], object]) -> None:
        try:
            call()
            found[name] = ""
        except UserError as error:
            found[name] = str(error)

    refusal("stripes and a recurrence", lambda: SequenceParallel(comm, layout="striped").check(recurrent=True))
    refusal("stripes and attention", lambda: SequenceParallel(comm, layout="striped").check(False, MASKS))
    refusal("rsa and a window", lambda: SequenceParallel(comm, attention="rsa").check(True, MASKS))
    refusal("rsa", lambda: SequenceParallel(comm, attention="rsa", layout="contiguous_per_document").check(True, MASKS[:2]))
    refusal("usp of 1 x 1", lambda: Usp(comm, Comm(None), Comm(None)))
    one = [dist.new_group([each]) for each in range(world_size)]
    refusal("usp of 2 x 1", lambda: Usp(comm, comm, Comm(one[rank])))
    for engine in ENGINES:
        if engine not in ("usp", "rsa"):
            refusal(engine, lambda engine=engine: SequenceParallel(comm, attention=engine, layout="zigzag").check(True, MASKS))
    documents = Documents((0, 5, 9))
    parallel = SequenceParallel(comm, layout="zigzag_per_document")
    shard = parallel.shard(documents)
    assert parallel.local_tokens(documents) == parallel.layout(documents).parts[rank]
    assert shard.num_tokens == sum(b - a for a, b in parallel.local_tokens(documents))
    refusal("documents", lambda: parallel.local_tokens(9))
    return found


def test_plug_in_says_what_does_not_fit() -> None:
    expected = {
        "stripes and a recurrence": "use contiguous, zigzag, contiguous_per_document, zigzag_per_document",
        "rsa and a window": "use all_gather, ring, ulysses, usp",
        "usp of 1 x 1": "inner x outer = 2 ranks, but 1 x 1 is 1",
        "documents": "needs the documents",
    }
    for found in run_ranks(plug_in, 2):
        for name, message in found.items():
            assert expected.get(name, "") in message
            assert bool(message) == (name in expected), f"{name}: {message}"
