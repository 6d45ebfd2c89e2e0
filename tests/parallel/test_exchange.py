"""Every exchange against `fold` on one process: what enters each part, what leaves the chain, and what that cost.

Toy maps stand for all mixers. Many cells stream through one call of the ranks, which compare and count by themselves.
"""

import itertools
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from longhaul.models.errors import UserError
from longhaul.models.ops.affine import AffineMap
from longhaul.models.ops.chain import Link, fold
from longhaul.models.ops.segments import Documents
from longhaul.parallel.comm import Comm, Ledger, Wire
from longhaul.parallel.exchange.base import Exchange, own_links
from longhaul.parallel.exchange.courier import Courier
from longhaul.parallel.exchange.registry import EXCHANGES, make_exchange
from longhaul.parallel.layout import SequenceLayout
from tests.harness import run_ranks
from tests.harness.cases import rank_lengths
from tests.harness.numerics import assert_close

from . import traffic
from .toy_maps import KINDS, H, K, V, make_maps, make_states, numbers

FLAT = ("all_gather", "ring", "ring_blocking", "all_scan", "log_scan")
TOLERANCE = 1e-12


class Cell(NamedTuple):
    """One exchange of random maps; everything follows from it alike on all ranks."""

    kind: str
    layout: SequenceLayout
    documents: Documents
    reverse: bool
    initial: bool
    want_end: bool
    seed: int

    def inputs(self) -> tuple[AffineMap, tuple[Link, ...], torch.Tensor | None]:
        """The maps of all parts in chain order, the chain, and what enters it."""
        generator = torch.Generator().manual_seed(self.seed)
        chain = self.layout.chain(self.documents)
        maps = make_maps(self.kind, [link.length for link in chain], generator)
        if self.reverse:
            # The cotangent at the entry of a part that nothing enters is zero.
            closed = torch.tensor([not link.enters for link in chain]).reshape(-1, 1, 1, 1)
            maps = maps.adjoint(maps.offset.masked_fill(closed, 0.0))
        return maps, chain, make_states(self.kind, 1, generator)[0] if self.initial else None

    def __str__(self) -> str:
        flags = [name for name in ("reverse", "initial", "want_end") if getattr(self, name)]
        where = f"{self.layout.name} {self.layout.parts}, documents {self.documents.bounds}"
        return f"{self.kind}, {where} from {self.documents.first_position}, {' '.join(flags)}"


def layouts(ranks: int) -> list[SequenceLayout]:
    """Contiguous even, uneven and with an empty rank; two parts a rank, as zigzag, with empty parts, and interleaved."""
    num_tokens = 6 * ranks + 1
    found = []
    for name, lengths in rank_lengths(num_tokens, ranks).items():
        found.append(SequenceLayout.contiguous(num_tokens, ranks, lengths))
        found[-1].name = name
    bounds = [num_tokens * k // (2 * ranks) for k in range(2 * ranks + 1)]
    for name, edges in {"zigzag": bounds, "zigzag_empty": [0, *bounds[:-2], num_tokens]}.items():
        ranges = list(zip(edges, edges[1:]))
        found.append(SequenceLayout([[ranges[r], ranges[-1 - r]] for r in range(ranks)], name))
    ranges = list(zip(bounds, bounds[1:]))
    # Slots out of chain order too.
    found.append(SequenceLayout([[ranges[ranks + r], ranges[r]] for r in range(ranks)], "interleaved"))
    return found


def tables(layout: SequenceLayout) -> Iterator[Documents]:
    """No cut, a cut at the start of every part, one inside every part, and at random."""
    length = layout.num_tokens
    starts = {start for own in layout.parts for start, stop in own if stop > start}
    inside = {start + 1 for own in layout.parts for start, stop in own if stop > start + 1}
    anywhere = random.Random(length * layout.num_parts)
    yield Documents((0, length))
    for cuts in (starts, inside, {anywhere.randrange(length) for _ in range(3)}, {length - 1}):
        yield Documents(sorted({0, length} | cuts))
        yield Documents(sorted({0, length} | cuts), first_position=5)
    yield Documents((0, length), first_position=5)


def cells(ranks: int, which: Callable[[SequenceLayout], bool] = lambda layout: True) -> Iterator[Cell]:
    """The product of layouts, documents, direction, initial and end; the kinds of map take turns."""
    kinds = itertools.cycle(KINDS)
    for layout in filter(which, layouts(ranks)):
        for documents in tables(layout):
            for seed, flags in enumerate(itertools.product((False, True), repeat=3)):
                yield Cell(next(kinds), layout, documents, *flags, seed)


def some(ranks: int, which: Callable[[SequenceLayout], bool] = lambda layout: True) -> Iterator[Cell]:
    """Every third cell: three shares no factor with the 8 flags, nor with the number of kinds."""
    return itertools.islice(cells(ranks, which), 0, None, 3)


def every_kind(ranks: int) -> Iterator[Cell]:
    """All kinds of map on zigzag parts, some of them cut, in both directions."""
    layout = next(layout for layout in layouts(ranks) if layout.name == "zigzag")
    documents = Documents((0, 4, layout.num_tokens), first_position=3)
    for kind, reverse in itertools.product(KINDS, (False, True)):
        yield Cell(kind, layout, documents, reverse, True, True, 1)


def _start(exchange: Exchange, cell: Cell) -> tuple[Any, tuple[Any, ...]]:
    maps, chain, initial = cell.inputs()
    own = own_links(chain, exchange.comm.rank)
    pending = exchange.start(maps.select(own), chain, initial, cell.reverse, cell.want_end)
    return pending, (maps, chain, initial, own)


def _compare(pending: Any, inputs: tuple[Any, ...], cell: Cell, name: str) -> None:
    maps, chain, initial, own = inputs
    entering, end = pending.wait()
    expected, expected_end = fold(maps, chain, initial, cell.reverse)
    full = [slot for slot, k in enumerate(own) if chain[k].length]  # a part without tokens reads nothing
    message = f"{name}: {cell}"
    assert entering.shape == expected[own].shape, message
    assert torch.isfinite(torch.view_as_real(entering) if entering.is_complex() else entering).all(), message
    assert_close(entering[full], expected[own][full], f"{message}: entering", tolerance=TOLERANCE)
    if cell.want_end:
        assert_close(end, expected_end, f"{message}: end", tolerance=TOLERANCE)


def _case(cell: Cell, maps: AffineMap, comm: Comm) -> traffic.Case:
    state = maps.offset[0].numel() * (2 if maps.offset.is_complex() else 1)
    chain = cell.layout.chain(cell.documents)
    flags = cell.reverse, cell.initial, cell.want_end
    return traffic.Case(chain, comm.rank, *flags, comm.size, cell.layout.num_parts, numbers(maps), state)


def _check(exchange: Exchange, cell: Cell, name: str, cost: Callable[[traffic.Case], traffic.Cost]) -> None:
    ledger = exchange.comm.ledger
    ledger.reset()
    pending, inputs = _start(exchange, cell)
    _compare(pending, inputs, cell, name)
    expected = cost(_case(cell, inputs[0], exchange.comm))
    total = ledger.total("state backward" if cell.reverse else "state forward")
    assert (total.messages, total.bytes) == (expected.messages, 8 * expected.numbers), f"{name}: {cell}: {total}"
    assert ledger.total().bytes == total.bytes


def _costs(blocks: int = 1) -> dict[str, Callable[[traffic.Case], traffic.Cost]]:
    return {
        "all_gather": traffic.all_gather,
        "ring": traffic.walk,
        "ring_blocking": traffic.walk,
        "all_scan": lambda case: traffic.walk(case, blocks),
        "log_scan": traffic.log_scan,
    }


def flat_cells(rank: int, world_size: int, names: Sequence[str]) -> int:
    """All cells through the exchanges of one level."""
    comm, count = Comm(dist.group.WORLD), 0
    for name in names:
        options = {"blocks": 3} if name == "all_scan" else {}
        exchange = make_exchange(name, comm, **options)
        for cell in itertools.chain(some(world_size), every_kind(world_size)):
            _check(exchange, cell, name, _costs(blocks=3)[name])
            count += 1
    return count


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_flat_exchanges(ranks: int) -> None:
    counts = run_ranks(flat_cells, ranks, names=FLAT, timeout=300)
    assert min(counts) > 5 * 200


def test_log_scan_on_six_ranks() -> None:
    assert len(run_ranks(flat_cells, 6, names=("log_scan",), timeout=300)) == 6


@pytest.mark.parametrize("name", FLAT)
def test_one_rank_sends_nothing(name: str) -> None:
    exchange = make_exchange(name, Comm(None))
    for cell in itertools.chain(cells(1), every_kind(1)):
        pending, inputs = _start(exchange, cell)
        _compare(pending, inputs, cell, name)
    assert exchange.comm.ledger.total().calls == 0


def _node_comms(rank: int, world_size: int, size: int, ledger: Ledger) -> tuple[Comm, Comm]:
    """The groups of one node and of the ranks with one index, all counted in one ledger."""
    nodes = [list(range(start, start + size)) for start in range(0, world_size, size)]
    intra, _ = dist.new_subgroups_by_enumeration(nodes)
    inter, _ = dist.new_subgroups_by_enumeration([list(index) for index in zip(*nodes)])
    return Comm(intra, ledger), Comm(inter, ledger)


def two_level_cells(rank: int, world_size: int, size: int, pairs: Sequence[tuple[str, str]]) -> None:
    """All contiguous cells through two levels; nodes of `size` ranks."""
    comm = Comm(dist.group.WORLD)
    intra, inter = _node_comms(rank, world_size, size, comm.ledger)
    for inside, across in pairs:
        exchange = make_exchange("hierarchical", comm, intra=intra, inter=inter, inside=inside, across=across)

        def cost(case: traffic.Case, inside: str = inside, across: str = across) -> traffic.Cost:
            return traffic.hierarchical(case, size, V, inside, across)

        for cell in some(world_size, lambda layout: layout.num_parts == 1):
            # An entry-wise M is cut with the state, which the formula leaves out.
            kind = cell.kind.replace("entry", "head" if cell.kind != "constant_entry" else "key")
            _check(exchange, cell._replace(kind=kind), f"{inside} inside, {across} across", cost)
        entries = Cell("log_entry", layouts(world_size)[0], Documents((0, 4, 6 * world_size + 1), 3), True, True, True, 0)
        pending, inputs = _start(exchange, entries)
        _compare(pending, inputs, entries, "entries")


@pytest.mark.parametrize(
    "ranks, size, pairs",
    [
        pytest.param(4, 2, [("all_gather", "ring"), ("log_scan", "log_scan"), ("all_gather", "all_gather")], id="2x2"),
        pytest.param(3, 1, [("log_scan", "ring")], id="3x1"),
        pytest.param(3, 3, [("log_scan", "ring")], id="1x3"),
        pytest.param(6, 2, [("all_gather", "ring")], id="3x2"),
        pytest.param(6, 3, [("log_scan", "ring")], id="2x3"),
    ],
)
def test_hierarchical(ranks: int, size: int, pairs: list[tuple[str, str]]) -> None:
    run_ranks(two_level_cells, ranks, size=size, pairs=pairs, timeout=300)


def more_ranks_in_a_node_than_values(rank: int, world_size: int) -> None:
    comm = Comm(dist.group.WORLD)
    intra, inter = _node_comms(rank, world_size, world_size, comm.ledger)
    exchange = make_exchange("hierarchical", comm, intra=intra, inter=inter)
    for kind, reverse in itertools.product(("scale_entry", "dense"), (False, True)):
        cell = Cell(kind, layouts(world_size)[0], Documents((0, 6 * world_size + 1), 3), reverse, True, True, 0)
        maps, chain, initial = cell.inputs()
        narrow = maps.split(V)[0]
        assert initial is not None
        pending = exchange.start(narrow.select([rank]), chain, initial[..., :1], reverse, True)
        _compare(pending, (narrow, chain, initial[..., :1], [rank]), cell, "one value")


def test_hierarchical_with_fewer_values_than_ranks() -> None:
    run_ranks(more_ranks_in_a_node_than_values, 3)


def several_in_flight(rank: int, world_size: int) -> None:
    """Four exchanges of unlike maps are started before the first is waited for."""
    comm = Comm(dist.group.WORLD)
    mixed = [cell for k, cell in enumerate(cells(world_size)) if k % 7 == 0]
    for name in sorted(set(FLAT) - {"ring_blocking"}):  # which waits for other ranks in `start`
        exchange = make_exchange(name, comm, **({"blocks": 2} if name == "all_scan" else {}))
        for start in range(0, len(mixed) - 3, 4):
            # One direction: a state that comes from the left must not wait for one from the right.
            batch = [cell._replace(reverse=start % 8 == 0) for cell in mixed[start : start + 4]]
            pendings = [_start(exchange, cell) for cell in batch]
            for (pending, inputs), cell in zip(pendings, batch):
                _compare(pending, inputs, cell, f"{name}, one of four")


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_exchanges_in_flight(ranks: int) -> None:
    run_ranks(several_in_flight, ranks)


class Untagged(Comm):
    """A group whose messages match in the order of posts alone."""

    tagged = False


def both_ways_of_posting(rank: int, world_size: int, blocks: Sequence[int]) -> int:
    """The same cells with all receives posted first, and in waves: equal bit by bit, in messages and in bytes."""
    flow, waves = Comm(dist.group.WORLD, wire=Wire()), Untagged(dist.group.WORLD)
    count = 0
    for number in blocks:
        one, other = (make_exchange("all_scan", comm, blocks=number) for comm in (flow, waves))
        for cell in itertools.islice(cells(world_size), 0, None, 5):  # 5 shares no factor with the flags and kinds
            (pending, inputs), (reference, _) = _start(one, cell), _start(other, cell)
            entering, end = pending.wait()
            expected, expected_end = reference.wait()
            chain, own = inputs[1], inputs[3]
            full = [slot for slot, k in enumerate(own) if chain[k].length]
            message = f"{number} blocks: {cell}"
            assert torch.equal(entering[full], expected[full]), message
            assert end is expected_end is None or torch.equal(end, expected_end), message
            totals = [comm.ledger.total() for comm in (flow, waves)]
            assert totals[0].messages == totals[1].messages and totals[0].bytes == totals[1].bytes, message
            count += 1
    assert flow.ledger.total().messages > count / 4  # something was sent
    return count


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_receives_posted_first_change_nothing(ranks: int) -> None:
    run_ranks(both_ways_of_posting, ranks, blocks=(1, 2, V))


def passed_on_beside_local_work(rank: int, world_size: int, name: str, options: dict[str, int], reverse: bool) -> list[str]:
    """The local work of every rank but the last in the chain lasts until the last has all that it waits for."""
    comm, word = Comm(dist.group.WORLD), Comm(dist.group.WORLD)
    exchange = make_exchange(name, comm, **options)
    cell = Cell("dense", layouts(world_size)[0], Documents((0, 6 * world_size + 1)), reverse, False, False, 0)
    comm.ledger.events = []
    pending, inputs = _start(exchange, cell)
    comm.ledger.mark("local")
    last = 0 if reverse else world_size - 1
    if rank == last:
        _compare(pending, inputs, cell, name)
    word.broadcast(torch.zeros(1), last, "done").wait()
    if rank != last:
        _compare(pending, inputs, cell, name)
    return comm.ledger.events


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name, options", [("ring", {}), ("all_scan", {"blocks": 3}), ("log_scan", {})])
def test_states_are_passed_on_beside_local_work(name: str, options: dict[str, int], reverse: bool) -> None:
    """It would hang, if a rank in the middle sent no more than what it could send in `start`."""
    found = run_ranks(passed_on_beside_local_work, 4, name=name, options=options, reverse=reverse, timeout=30)
    blocks = options.get("blocks", 1)
    for events in found[1:-1]:
        # All that will come has been asked for before the local work.
        assert events[: events.index("local")].count("post state " + ("backward" if reverse else "forward")) >= blocks


def test_a_courier_brings_errors_and_knows_the_mode() -> None:
    courier, seen = Courier(), []

    def errand() -> None:
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), threading.current_thread()))

    def fails() -> None:
        raise UserError("Lost.")

    courier.run(errand).result()
    with torch.inference_mode():
        courier.run(errand).result()
    with pytest.raises(UserError, match="Lost"):
        courier.run(fails).result()
    courier.run(errand).result()  # it goes on
    assert [modes for *modes, _ in seen] == [[False, False], [False, True], [False, False]]
    thread = seen[0][2]
    assert thread is not threading.current_thread() and thread.daemon
    del courier
    thread.join(10)
    assert not thread.is_alive()


def order_of_events(rank: int, world_size: int) -> dict[str, list[str]]:
    comm, found = Comm(dist.group.WORLD), {}
    cell = Cell("dense", layouts(world_size)[0], Documents((0, 6 * world_size + 1)), False, False, False, 0)
    for name in FLAT:
        comm.ledger.events = []
        pending, _ = _start(make_exchange(name, comm, **({"blocks": 2} if name == "all_scan" else {})), cell)
        comm.ledger.mark("local")
        pending.wait()
        found[name] = comm.ledger.events
    return found


def test_local_work_stands_between_post_and_wait() -> None:
    first, middle, last = run_ranks(order_of_events, 3)
    for events in (first, middle, last):
        assert events["all_gather"] == ["post state forward", "local", "wait state forward"]
    post, wait, local = "post state forward", "wait state forward", "local"
    assert first["ring"] == [post, local, wait]
    assert first["all_scan"] == [post, post, local, wait, wait]
    # What comes is asked for at once; when it goes on is the courier's affair, which may be before the local work or after.
    for name, blocks in (("ring", 1), ("all_scan", 2)):
        assert middle[name][:blocks] == [post] * blocks
        assert sorted(middle[name]) == sorted([local, *([post, wait] * 2 * blocks)])
    assert last["ring"] == [post, local, wait]
    assert last["all_scan"] == [post, post, local, wait, wait]
    for events, steps in ((first, 2), (middle, 1), (last, 2)):
        assert events["log_scan"][0] == post and sorted(events["log_scan"]) == sorted([local, *([post, wait] * steps)])
    # The published order: receive, local work, send.
    assert first["ring_blocking"] == [local, post, wait]
    assert middle["ring_blocking"] == [post, wait, local, post, wait]
    assert last["ring_blocking"] == [post, wait, local]


def rounded_payload(rank: int, world_size: int, dtype: torch.dtype) -> None:
    """Offsets in bfloat16, linear parts untouched, the fold in the accumulation dtype."""
    comm = Comm(dist.group.WORLD)
    exchange = make_exchange("all_gather", comm, payload_dtype="bfloat16")
    for cell in itertools.islice(cells(world_size), 0, None, 3):
        if cell.kind.endswith("complex"):
            continue
        comm.ledger.reset()
        maps, chain, initial = cell.inputs()
        linear = maps.linear.unpack(maps.pack()[:, H * K * V :].to(dtype), [link.length for link in chain])
        maps = AffineMap(maps.offset.to(dtype), linear)
        own = own_links(chain, rank)
        entering, end = exchange.start(maps.select(own), chain, initial, cell.reverse, True).wait()
        rounded = AffineMap(maps.offset.to(torch.bfloat16).to(dtype), linear)
        expected, expected_end = fold(rounded, chain, initial, cell.reverse)
        assert entering.dtype == dtype
        assert_close(entering, expected[own], f"{cell}: entering", tolerance=1e-12 if dtype is torch.float64 else 1e-6)
        assert_close(end, expected_end, f"{cell}: end", tolerance=1e-12 if dtype is torch.float64 else 1e-6)
        size = 2 * H * K * V + dtype.itemsize * (numbers(maps) - H * K * V)
        assert comm.ledger.total().bytes == (world_size - 1) * cell.layout.num_parts * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rounded_payload(dtype: torch.dtype) -> None:
    run_ranks(rounded_payload, 3, dtype=dtype)


@pytest.mark.parametrize("name", sorted(set(FLAT) - {"all_gather"}))
def test_running_states_are_never_rounded(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}.*running state.*'bfloat16'.*all_gather"):
        make_exchange(name, Comm(None), payload_dtype="bfloat16")


def test_unknown_names_and_options_are_refused() -> None:
    comm = Comm(None)
    assert set(FLAT) < set(EXCHANGES)
    for call, message in {
        lambda: make_exchange("all_scn", comm): "'all_scn' is no exchange; did you mean 'all_scan'",
        lambda: make_exchange("ring", comm, blocks=2): "'ring' has no option 'blocks'",
        lambda: make_exchange("all_scan", comm, blocks=0): "at least 1 block, not 0",
        lambda: make_exchange("all_gather", comm, payload_dtype="int8"): "'int8' is neither",
        lambda: make_exchange("hierarchical", comm): "needs the groups",
        lambda: make_exchange("hierarchical", comm, intra=comm, inter=comm, inside="ring"): "'ring' passes states",
    }.items():
        with pytest.raises(UserError, match=message):
            call()


def wrong_nodes(rank: int, world_size: int) -> str:
    comm = Comm(dist.group.WORLD)
    intra, inter = _node_comms(rank, world_size, 2, comm.ledger)
    try:
        make_exchange("hierarchical", comm, intra=inter, inter=intra)
    except UserError as error:
        return str(error)
    return ""


def test_hierarchical_refuses_what_it_cannot_serve() -> None:
    assert any("consecutive ranks" in message for message in run_ranks(wrong_nodes, 4))
    exchange = make_exchange("hierarchical", Comm(None), intra=Comm(None), inter=Comm(None))
    for layout in layouts(1):
        if layout.num_parts == 1:
            exchange.check(layout)
            continue
        with pytest.raises(UserError, match=f"'hierarchical' serves one part a rank.*'{layout.name}'"):
            exchange.check(layout)
        maps, chain, _ = Cell("dense", layout, Documents((0, 7)), False, False, False, 0).inputs()
        with pytest.raises(UserError, match="not parts of ranks"):
            exchange.start(maps, chain)
    for name in FLAT:
        for layout in layouts(1):
            make_exchange(name, Comm(None)).check(layout)


def test_default_number_of_blocks() -> None:
    """The K of least time for links that carry LATENCY_BYTES in one latency, found here by trying all."""
    from longhaul.parallel.exchange.all_scan import LATENCY_BYTES, AllScan

    comm = Comm(None)
    exchange = AllScan(comm)
    for ranks, heads, values in itertools.product((1, 2, 3, 8, 64), (1, 16), (4, 128, 256)):
        comm.size = ranks
        state = torch.zeros(heads, 128, values)
        size = state.numel() * 4
        times = {k: (ranks - 2 + k) * (1 + size / LATENCY_BYTES / k) for k in range(1, values + 1)}
        chosen = exchange.num_blocks(state)
        assert 1 <= chosen <= values
        if ranks > 1:
            assert times[chosen] <= 1.06 * min(times.values())
