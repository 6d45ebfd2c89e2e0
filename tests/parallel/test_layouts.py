"""Every layout by name: tiles exactly once, is balanced, goes round trip, and chains as a look at every token says."""

import functools
import random

import pytest
import torch
import torch.distributed as dist

from longhaul.launcher.verify.exactness import compare, make_problem
from longhaul.models.errors import UserError
from longhaul.models.ops.segments import Documents, Segments
from longhaul.parallel.comm import Comm
from longhaul.parallel.layout import LAYOUTS, SequenceLayout, check_recurrent
from tests.door.ranks import WIDTH, make_module, make_shard
from tests.harness.cases import document_tables
from tests.harness.numerics import TOLERANCE
from tests.harness.pool import run_ranks

RANKS = (1, 2, 3, 4, 7)


def tables() -> list[Documents]:
    lengths = [1, 2, 3, 7, 8, 24, 61]
    found = [Documents((0,))]
    for length in lengths:
        for bounds in document_tables(length).values():
            found += [Documents(bounds), Documents(bounds, 5)]
    return found


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_tiles_exactly_once_and_is_balanced(name: str, ranks: int) -> None:
    for documents in tables():
        layout = SequenceLayout.make(name, documents, ranks)
        held = [token for own in layout.parts for start, stop in own for token in range(start, stop)]
        assert sorted(held) == list(range(documents.num_tokens))
        assert {len(own) for own in layout.parts} == {layout.num_parts}
        counts = [layout.tokens_of(rank) for rank in range(ranks)]
        assert max(counts) - min(counts) <= 1
        for own in layout.parts:
            assert list(own) == sorted(own), "parts of a rank stand in chain order"
        assert layout.max_tokens() == max(counts) and layout.name == name and layout.num_ranks == ranks


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_round_trip(name: str, ranks: int) -> None:
    """Every rank's tokens, put back in chain order, are the stream."""
    for documents in tables():
        layout = SequenceLayout.make(name, documents, ranks)
        local = [[token for start, stop in own for token in range(start, stop)] for own in layout.parts]
        offsets = [layout.segments(rank, documents).part_bounds for rank in range(ranks)]
        stream = [token for rank, slot in layout.order for token in local[rank][offsets[rank][slot] : offsets[rank][slot + 1]]]
        assert stream == list(range(documents.num_tokens))


@pytest.mark.parametrize("name", LAYOUTS)
def test_chain_agrees_with_segments(name: str) -> None:
    for documents in tables():
        for ranks in (1, 3, 4):
            layout = SequenceLayout.make(name, documents, ranks)
            for link in layout.chain(documents):
                piece = Segments(documents, [layout.parts[link.owner][link.slot]])
                tail = piece.bounds[-1] - piece.bounds[-2] if piece.cuts[0] else piece.num_tokens
                assert link[2:] == (piece.num_tokens, tail, piece.cuts[0], piece.enters[0])


def test_zigzag_is_the_snake() -> None:
    assert SequenceLayout.make("zigzag", 12, 3).parts == (((0, 2), (10, 12)), ((2, 4), (8, 10)), ((4, 6), (6, 8)))


def test_zigzag_shares_causal_work() -> None:
    """Query-key pairs of a long document: equal to one row of the square for every pair of ranks."""
    for ranks in (2, 3, 4, 7):
        layout = SequenceLayout.make("zigzag", 1000, ranks)
        work = [sum(token + 1 for start, stop in own for token in range(start, stop)) for own in layout.parts]
        assert max(work) - min(work) <= 2 * 1000


def test_striped_blocks() -> None:
    assert SequenceLayout.make("striped", 7, 2, block=2).parts == (((0, 2), (4, 6)), ((2, 4), (6, 7)))
    assert SequenceLayout.make("striped", 5, 3, block=1).parts == (((0, 1), (3, 4)), ((1, 2), (4, 5)), ((2, 3), (5, 5)))
    assert SequenceLayout.make("striped", 10_000_000, 8).num_parts == 16


def test_per_document_layouts_cut_every_document() -> None:
    documents = Documents((0, 6, 8, 20))
    assert SequenceLayout.make("contiguous_per_document", documents, 2).parts == (
        ((0, 3), (6, 7), (8, 14)),
        ((3, 6), (7, 8), (14, 20)),
    )
    assert SequenceLayout.make("zigzag_per_document", Documents((0, 8, 12)), 2).parts == (
        ((0, 2), (6, 8), (8, 9), (11, 12)),
        ((2, 4), (4, 6), (9, 10), (10, 11)),
    )


@pytest.mark.parametrize("name", ("contiguous_per_document", "zigzag_per_document"))
def test_left_over_tokens_go_round(name: str) -> None:
    """A thousand documents of awkward lengths: the remainders do not pile up on one rank."""
    lengths = random.Random(0).choices(range(1, 12), k=1000)
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    counts = [SequenceLayout.make(name, Documents(bounds), 5).tokens_of(rank) for rank in range(5)]
    assert max(counts) - min(counts) <= 1


def test_chain_of_many_documents() -> None:
    documents = Documents(range(100_001))
    layout = SequenceLayout.make("zigzag", documents, 4)
    links = layout.chain(documents)
    assert len(links) == 8 and all(link.cut and not link.enters and link.tail == 1 for link in links)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SequenceLayout.make("zigzga", 8, 2), "'zigzga' is no layout; did you mean 'zigzag'"),
        (lambda: SequenceLayout.make("x", 8, 2), "choose from contiguous, zigzag, striped"),
        (lambda: SequenceLayout.make("zigzag", 8, 2, lengths=(3, 5)), "'zigzag' has no option 'lengths'; it takes none"),
        (lambda: SequenceLayout.make("striped", 8, 2, block=0), "at least one token"),
        (lambda: SequenceLayout.make("zigzag_per_document", 8, 2), "needs the documents"),
        (lambda: check_recurrent("striped"), "use contiguous, zigzag, contiguous_per_document, zigzag_per_document"),
    ],
)
def test_refusals(call: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()  # type: ignore[operator]


def test_recurrences_run_on_all_others() -> None:
    for name, kind in LAYOUTS.items():
        if kind.recurrent:
            check_recurrent(name)


def recurrence(rank: int, world_size: int) -> dict[str, tuple[float, str]]:
    """The worst error of every tensor of a gated recurrence with a convolution, and where."""
    comm, module, worst = Comm(dist.group.WORLD), make_module("mamba2"), {}
    for table, bounds in document_tables(31).items():
        for name in LAYOUTS:
            documents = Documents(bounds, 5)
            problem = make_problem(module, documents, WIDTH, 1, torch.float64, keep_state=True)
            layout = SequenceLayout.make(name, documents, world_size)
            for tensor, value in compare(module, functools.partial(make_shard, comm), layout, problem, comm).items():
                if not value <= worst.get(tensor, (-1.0, ""))[0]:
                    worst[tensor] = (value, f"{table}, {name}")
    return worst


@pytest.mark.parametrize("world_size", (2, 3))
def test_recurrences_are_exact_on_every_layout(world_size: int) -> None:
    for rank, worst in enumerate(run_ranks(recurrence, world_size, timeout=120)):
        for tensor, (value, where) in worst.items():
            assert value <= TOLERANCE[torch.float64], f"rank {rank}, {tensor}: error {value:.1e} at {where}"
