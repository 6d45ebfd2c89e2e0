"""Bounded pools against lists filled token by token: what is read, what is kept, every gradient."""

import itertools

import pytest
import torch
from torch import Tensor

from longhaul.models.ops.pool import POLICIES, PoolMerge, Selection, make_notes, pool_cells, positions_of, read
from longhaul.models.ops.pool.naive import naive_pool
from longhaul.models.ops.segments import Documents, Segments
from longhaul.models.sequence import WholeSequence
from tests.harness.numerics import assert_bitwise_equal, assert_close

WIDTH, SLOTS, BLOCK = 4, 3, 5
STREAMS = {
    "one": ((0, 61), 0),
    "continued": ((0, 61), 13),
    "documents": ((0, 1, 3, 30, 31, 44, 61), 0),
    "continued, then documents": ((0, 2, 30, 61), 7),
    "short": ((0, 2), 0),
    "nothing": ((0,), 0),
}


def make_inputs(documents: Documents, generator: torch.Generator, ties: bool = False) -> tuple[Tensor, ...]:
    """q, summary, score, noted; scores of a few values if there are to be ties."""
    T = documents.num_tokens
    q, summary = (torch.randn(T, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    score = torch.rand(T, generator=generator, dtype=torch.float64)
    if ties:
        score = (score * 3).ceil() / 3
    return q, summary, score, torch.rand(T, generator=generator) < 0.6


def notes_of(documents: Documents, summary: Tensor, score: Tensor, noted: Tensor) -> Tensor:
    positions = WholeSequence(documents).positions
    return make_notes(summary * score[:, None], score, positions, noted)


def run(q: Tensor, notes: Tensor, documents: Documents, policy: str, state: Tensor | None) -> tuple[Tensor, Tensor]:
    shard = WholeSequence(documents, keep_state=True)
    cells = pool_cells(shard.segments, BLOCK, "cpu")
    selection = Selection(notes, cells, SLOTS, policy)
    before, after = shard.prefix(PoolMerge(BLOCK, policy), selection.element(), state)
    return read(q, selection.visible(before), cells), after


def earlier_pool(first_position: int, policy: str, generator: torch.Generator) -> Tensor:
    documents = Documents((0, first_position))
    q, *rest = make_inputs(documents, generator)
    return naive_pool(q, notes_of(documents, *rest), documents, BLOCK, SLOTS, policy)[1]


@pytest.mark.parametrize("ties", (False, True), ids=("distinct", "ties"))
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("stream", STREAMS)
def test_pools_equal_lists(stream: str, policy: str, ties: bool, generator: torch.Generator) -> None:
    documents = Documents(*STREAMS[stream])
    q, summary, score, noted = make_inputs(documents, generator, ties)
    first = documents.first_position
    state = earlier_pool(first, policy, generator) if first else torch.zeros(2, SLOTS, WIDTH + 3, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (q, summary, score, state)]
    results = []
    for compute in (run, lambda *args: naive_pool(*args[:3], BLOCK, SLOTS, *args[3:])):
        out, after = compute(q, notes_of(documents, summary, score, noted), documents, policy, state)
        weights = torch.randn(out.shape, generator=generator.manual_seed(1), dtype=torch.float64)
        outside = torch.randn(after.shape, generator=generator, dtype=torch.float64)
        outside = outside * (positions_of(after) >= 0)[..., None]  # an empty slot is no one's
        loss = (out * weights).sum() + (after * outside).sum()
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        results.append((out, after, *gradients))
    for name, found, expected in zip(("read", "state", "dq", "dsummary", "dscore", "dstate"), *results):
        assert_close(found, expected, name)
    if stream == "one":
        assert (positions_of(results[0][1]) >= 0).sum() > SLOTS and results[0][0][:BLOCK].abs().max() == 0
        assert all(gradient.abs().max() > 0 for gradient in results[0][2:5])


@pytest.mark.parametrize("policy", POLICIES)
def test_the_merge_is_associative_and_empty_changes_nothing(policy: str, generator: torch.Generator) -> None:
    documents, merge = Documents((0, 61)), PoolMerge(BLOCK, policy)
    _, *rest = make_inputs(documents, generator, ties=True)
    notes = notes_of(documents, *rest)
    edges = (0, 4, 4, 7, 22, 23, 41, 61)
    segments = Segments(documents, list(zip(edges, edges[1:])))
    elements = Selection(notes, pool_cells(segments, BLOCK, "cpu"), SLOTS, policy).element()
    whole = Selection(notes, pool_cells(Segments(documents, [(0, 61)]), BLOCK, "cpu"), SLOTS, policy).element()[0]
    left = merge.empty(elements[0])
    for element in elements:
        left = merge.combine(left, element)
    right = merge.empty(elements[0])
    for element in elements.flip(0):
        right = merge.combine(element, right)
    assert_bitwise_equal(left, whole, "from the left")
    assert_bitwise_equal(right, whole, "from the right")
    for a, b, c in itertools.combinations(elements, 3):
        one, other = merge.combine(merge.combine(a, b), c), merge.combine(a, merge.combine(b, c))
        assert_bitwise_equal(one, other, "three parts")


def test_late_positions_are_exact_in_single_precision() -> None:
    positions = torch.tensor([0, 2**20 - 2, 2**20 - 1, 2**24 + 1, 2**40 + 12345])
    notes = make_notes(torch.zeros(5, 2, dtype=torch.bfloat16), torch.rand(5), positions, torch.arange(5) != 1)
    assert notes.dtype == torch.float32
    assert positions_of(notes).tolist() == [0, -1, 2**20 - 1, 2**24 + 1, 2**40 + 12345]


def test_long_cells_are_read_tile_by_tile(generator: torch.Generator) -> None:
    """Blocks longer than a tile, tiles that end with their cell."""
    documents = Documents((0, 70, 75, 180))
    q, *rest = make_inputs(documents, generator)
    notes = notes_of(documents, *rest)
    shard = WholeSequence(documents)
    cells = pool_cells(shard.segments, 40, "cpu")
    selection = Selection(notes, cells, SLOTS, "priority")
    before, _ = shard.prefix(PoolMerge(40, "priority"), selection.element())
    expected, _ = naive_pool(q, notes, documents, 40, SLOTS, "priority")
    assert_close(read(q, selection.visible(before), cells), expected, "read")
