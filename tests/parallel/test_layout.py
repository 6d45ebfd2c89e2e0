"""Which tokens a rank holds, and the chain of parts, against a look at every single token."""

import pytest

from longhaul.models.errors import UserError
from longhaul.models.ops.segments import Documents
from longhaul.parallel.layout import SequenceLayout
from tests.harness.cases import document_tables, rank_lengths

T = 23


def zigzag(bounds: tuple[int, ...]) -> SequenceLayout:
    """2P ranges cut at `bounds`: rank r holds number r and number 2P - 1 - r."""
    ranges = list(zip(bounds, bounds[1:]))
    half = len(ranges) // 2
    return SequenceLayout([[ranges[r], ranges[-1 - r]] for r in range(half)], "zigzag")


LAYOUTS = [
    *(
        pytest.param(SequenceLayout.contiguous(T, ranks, lengths), id=f"{name}{ranks}")
        for ranks in (1, 2, 3, 4)
        for name, lengths in rank_lengths(T, ranks).items()
    ),
    pytest.param(zigzag((0, 3, 8, 12, 12, 22, T)), id="zigzag3"),
    pytest.param(zigzag((0, 0, 8, 8, T)), id="zigzag2_empty"),
    pytest.param(SequenceLayout([[(5, 9)], [(0, 5)], [(9, T)]]), id="permuted"),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("table", document_tables(T))
@pytest.mark.parametrize("first_position", [0, 4])
def test_chain_token_by_token(layout: SequenceLayout, table: str, first_position: int) -> None:
    bounds = document_tables(T)[table]
    documents = Documents(bounds, first_position)
    position = [t - max(b for b in bounds if b <= t) + (first_position if t < bounds[1] else 0) for t in range(T)]
    chain = layout.chain(documents)
    assert sorted((link.owner, link.slot) for link in chain) == [
        (rank, slot) for rank in range(layout.num_ranks) for slot in range(layout.num_parts)
    ]
    token = 0
    for link in chain:
        tokens = range(token, token + link.length)
        assert layout.parts[link.owner][link.slot] == (tokens.start, tokens.stop)
        starts = [t for t in tokens if position[t] == 0]
        assert link.cut == bool(starts)
        assert link.enters == (not tokens or position[tokens.start] > 0)
        assert link.tail == (tokens.stop - starts[-1] if starts else link.length)
        token = tokens.stop
    assert token == T == layout.num_tokens
    assert layout.max_tokens() == max(sum(b - a for a, b in own) for own in layout.parts)
    for rank in range(layout.num_ranks):
        segments = layout.segments(rank, documents)
        held = [t for start, stop in layout.parts[rank] for t in range(start, stop)]
        assert segments.positions().tolist() == [position[t] for t in held]
        assert segments.num_parts == layout.num_parts and segments.num_tokens == len(held)


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 5, 12])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_contiguous_is_even_and_in_order(num_tokens: int, ranks: int) -> None:
    layout = SequenceLayout.contiguous(num_tokens, ranks)
    lengths = [stop - start for ((start, stop),) in layout.parts]
    assert max(lengths) - min(lengths) <= 1 and sum(lengths) == num_tokens
    assert [rank for rank, _ in layout.order] == list(range(ranks))
    assert layout.num_parts == 1 and layout.num_ranks == ranks and layout.name == "contiguous"


def test_user_lengths() -> None:
    assert SequenceLayout.contiguous(5, 3, (0, 5, 0)).parts == (((0, 0),), ((0, 5),), ((5, 5),))
    for lengths in ((2, 2), (2, 2, 2), (6, -1, 0)):
        with pytest.raises(UserError, match=r"contiguous|spread 5 tokens over 3 ranks"):
            SequenceLayout.contiguous(5, 3, lengths)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([[(0, 2)], [(3, 5)]], r"'odd' does not tile.*rank 1 holds \[3, 5\) after 2"),
        ([[(0, 3)], [(2, 5)]], "rank 1 holds"),
        ([[(0, 3), (5, 6)], [(3, 5)]], "different numbers of parts"),
        ([[(1, 3)]], "after 0"),
    ],
)
def test_parts_must_tile_the_stream(parts: list[list[tuple[int, int]]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SequenceLayout(parts, "odd")


def test_documents_of_another_length_are_refused() -> None:
    layout = SequenceLayout.contiguous(5, 2)
    for call in (lambda: layout.chain(Documents((0, 4))), lambda: layout.segments(0, Documents((0, 6)))):
        with pytest.raises(UserError, match="is for 5 tokens, but the documents hold"):
            call()


def test_shares() -> None:
    assert SequenceLayout.make("contiguous", 12, 3, shares=(1, 2, 1)).parts == (((0, 3),), ((3, 9),), ((9, 12),))
    assert SequenceLayout.make("contiguous", 7, 3, shares=(0, 0.5, 0.5)).parts == (((0, 0),), ((0, 4),), ((4, 7),))
    assert SequenceLayout.make("contiguous", 1, 2, shares=(3, 1)).parts == (((0, 1),), ((1, 1),))
    for shares in ((1, 1), (1, -1, 1), (0, 0, 0), (1, float("inf"), 1)):
        with pytest.raises(UserError, match="give 3 numbers that are not negative"):
            SequenceLayout.make("contiguous", 7, 3, shares=shares)
