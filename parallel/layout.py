"""Which global tokens each rank of a sequence group holds. Integers only; no group, no tensor.

Nothing needs to be divisible, and a rank may be empty. Every rank has the same number of parts (so that one gather
serves all), each in stream order: one in the contiguous layout, two in zigzag, many in the others. A new layout is a
function from documents and ranks to parts, and one line of `LAYOUTS`.
"""

from __future__ import annotations

import difflib
import inspect
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from longhaul.models.errors import UserError
from longhaul.models.ops.chain import Link
from longhaul.models.ops.segments import Documents, Segments

Range = tuple[int, int]
Parts = list[list[Range]]

STRIPES = 16  # parts a rank of the striped layout, unless a block is given: balance to a sixteenth, tables stay short


class SequenceLayout:
    """Rank -> its global token ranges, in chain order.

    Args:
        parts: for each rank, its ranges `(start, stop)`; together they tile `[0, num_tokens)` exactly once.
        name: for messages.
    """

    def __init__(self, parts: Sequence[Sequence[Range]], name: str = "custom") -> None:
        self.parts = tuple(tuple((int(a), int(b)) for a, b in ranges) for ranges in parts)
        self.name = name
        ranges = sorted(
            (start, stop, rank, slot)
            for rank, own in enumerate(self.parts)
            for slot, (start, stop) in enumerate(own)
        )
        token = 0
        for start, stop, rank, _ in ranges:
            if start != token or stop < start:
                raise UserError(f"Layout {name!r} does not tile the stream: rank {rank} holds [{start}, {stop}) after {token}.")
            token = stop
        if len({len(own) for own in self.parts}) > 1:
            raise UserError(f"Layout {name!r} gives ranks different numbers of parts; pad with empty parts.")
        self.num_tokens, self.num_ranks = token, len(self.parts)
        self.num_parts = len(self.parts[0])
        self.order = tuple((rank, slot) for _, _, rank, slot in ranges)

    @classmethod
    def make(cls, name: str, tokens: Documents | int, ranks: int, **options: Any) -> SequenceLayout:
        """The layout called `name`.

        Args:
            tokens: the documents of the stream, or its length where documents do not matter.
            ranks: how many hold it.
            options: of the layout's own: `lengths` or `shares` of contiguous, `block` of striped.
        """
        kind = layout_kind(name)
        known = list(inspect.signature(kind.cut).parameters)[2:]
        for option in options:
            if option not in known:
                raise UserError(f"Layout {name!r} has no option {option!r}; it takes {', '.join(known) or 'none'}.")
        if not isinstance(tokens, Documents):
            if kind.per_document:
                raise UserError(f"Layout {name!r} cuts every document, so it needs the documents, not only {tokens} tokens.")
            tokens = Documents((0, tokens) if tokens else (0,))
        return cls(kind.cut(tokens, ranks, **options), name)

    @classmethod
    def contiguous(
        cls, num_tokens: int, num_ranks: int, lengths: Sequence[int] | None = None
    ) -> SequenceLayout:
        """One run of tokens per rank; `lengths` (tokens of each rank) makes it uneven."""
        return cls.make("contiguous", num_tokens, num_ranks, lengths=lengths)

    def segments(self, rank: int, documents: Documents) -> Segments:
        """The parts and segments that `rank` holds."""
        self._check(documents)
        return Segments(documents, self.parts[rank])

    def chain(self, documents: Documents) -> tuple[Link, ...]:
        """All parts of the stream in order, with their owners."""
        self._check(documents)
        bounds = documents.bounds
        links = []
        for rank, slot in self.order:
            start, stop = self.parts[rank][slot]
            first = bisect_left(bounds, start)  # the first document that starts at or after the part's first token
            last = bisect_left(bounds, stop) - 1  # the last one that starts before its end
            if first == 0 and documents.first_position:
                first = 1  # it started earlier, in another stream
            cut = stop > start and last >= first
            enters = stop == start or not cut or bounds[first] > start
            links.append(Link(rank, slot, stop - start, stop - bounds[last] if cut else stop - start, cut, enters))
        return tuple(links)

    def crossing(self, documents: Documents) -> list[int]:
        """The documents that more than one rank holds tokens of, in order."""
        self._check(documents)
        found: list[int] = []
        owner = None
        for rank, slot in self.order:
            start, stop = self.parts[rank][slot]
            if start == stop:
                continue
            document = bisect_right(documents.bounds, start) - 1
            if owner not in (None, rank) and documents.bounds[document] < start and found[-1:] != [document]:
                found.append(document)
            owner = rank
        return found

    def _check(self, documents: Documents) -> None:
        if documents.num_tokens != self.num_tokens:
            raise UserError(
                f"Layout {self.name!r} is for {self.num_tokens} tokens, but the documents hold {documents.num_tokens}."
            )

    def tokens_of(self, rank: int) -> int:
        """How many tokens `rank` holds."""
        return sum(stop - start for start, stop in self.parts[rank])

    def max_tokens(self) -> int:
        """The most tokens any rank holds."""
        return max(self.tokens_of(rank) for rank in range(self.num_ranks))


def even_cut(start: int, stop: int, pieces: int) -> list[Range]:
    """`pieces` consecutive ranges whose lengths differ by one at most."""
    length = stop - start
    edges = [start + length * piece // pieces for piece in range(pieces + 1)]
    return list(zip(edges, edges[1:]))


def _contiguous(
    documents: Documents, ranks: int, lengths: Sequence[int] | None = None, shares: Sequence[float] | None = None
) -> Parts:
    """One run of tokens per rank: even, of these `lengths`, or in proportion to `shares`."""
    total = documents.num_tokens
    if lengths is None:
        return [[run] for run in (even_cut(0, total, ranks) if shares is None else _shared_cut(total, ranks, shares))]
    if len(lengths) != ranks or sum(lengths) != total:
        raise UserError(f"Lengths {tuple(lengths)} do not spread {total} tokens over {ranks} ranks.")
    starts = [sum(lengths[:rank]) for rank in range(ranks)]
    return [[(start, start + length)] for start, length in zip(starts, lengths)]


def _shared_cut(total: int, ranks: int, shares: Sequence[float]) -> list[Range]:
    """Edges at the nearest token to each cumulated share; a share of zero is an empty rank."""
    whole = sum(shares)
    if len(shares) != ranks or not 0 < whole < math.inf or min(shares) < 0:
        raise UserError(
            f"parallel.layout_shares is {list(shares)}: give {ranks} numbers that are not negative, and not all zero."
        )
    edges = [round(total * sum(shares[:rank]) / whole) for rank in range(ranks)] + [total]
    return list(zip(edges, edges[1:]))


def _zigzag(documents: Documents, ranks: int) -> Parts:
    """Rank r holds chunks r and 2P - 1 - r of 2P, so that causal attention costs every rank the same."""
    return [list(chunks) for chunks in next(_snakes([(0, documents.num_tokens)], ranks))]


def _striped(documents: Documents, ranks: int, block: int | None = None) -> Parts:
    """Block j of `block` tokens on rank j mod P (Brandon et al., arXiv 2311.09431, with block 1)."""
    total = documents.num_tokens
    if block is None:
        block = max(1, -(-total // (ranks * STRIPES)))
    if block < 1:
        raise UserError(f"A stripe holds at least one token, but parallel.layout_stripe is {block}.")
    rounds = -(-total // (ranks * block))
    return [
        [
            (min(total, (turn * ranks + rank) * block), min(total, (turn * ranks + rank + 1) * block))
            for turn in range(max(rounds, 1))
        ]
        for rank in range(ranks)
    ]


def _contiguous_per_document(documents: Documents, ranks: int) -> Parts:
    """Every document in P runs, one a rank; the tokens left over go round, so that ranks stay equal to one token."""
    parts: Parts = [[] for _ in range(ranks)]
    first = 0
    for start, stop in _document_ranges(documents):
        share, extra = divmod(stop - start, ranks)
        token = start
        for rank in range(ranks):
            end = token + share + ((rank - first) % ranks < extra)
            parts[rank].append((token, end))
            token = end
        first = (first + extra) % ranks
    return parts


def _zigzag_per_document(documents: Documents, ranks: int) -> Parts:
    """Every document in 2P chunks, r and 2P - 1 - r on rank r."""
    parts: Parts = [[] for _ in range(ranks)]
    for chunks in _snakes(_document_ranges(documents), ranks):
        for rank, own in enumerate(chunks):
            parts[rank].extend(own)
    return parts


def _document_ranges(documents: Documents) -> list[Range]:
    """Token ranges of the documents; an empty stream has one, empty."""
    return list(zip(documents.bounds, documents.bounds[1:])) or [(0, 0)]


def _snakes(runs: Sequence[Range], ranks: int) -> Iterator[list[tuple[Range, Range]]]:
    """Cut each run into 2P chunks; ranks' totals over all runs differ by one token at most.

    Yields:
        For each run, chunks r and 2P - 1 - r of every rank r.
    """
    first = 0
    for start, stop in runs:
        share, extra = divmod(stop - start, 2 * ranks)
        edges = [start]
        for chunk in range(2 * ranks):
            # Tokens left over go round the ranks from `first` on: once to their first chunk, then to their second.
            late = chunk >= ranks
            place = ((2 * ranks - 1 - chunk if late else chunk) - first) % ranks
            edges.append(edges[-1] + share + (place + ranks * late < extra))
        chunks = list(zip(edges, edges[1:]))
        yield [(chunks[rank], chunks[2 * ranks - 1 - rank]) for rank in range(ranks)]
        first = (first + extra) % ranks


class LayoutKind(NamedTuple):
    """A way to spread tokens.

    Attributes:
        cut: from documents and the number of ranks (and options) to every rank's ranges.
        per_document: the documents decide; otherwise only the length of the stream does.
        recurrent: a recurrence over it has few enough parts to be worth running.
    """

    cut: Callable[..., Parts]
    per_document: bool = False
    recurrent: bool = True


LAYOUTS: dict[str, LayoutKind] = {
    "contiguous": LayoutKind(_contiguous),
    "zigzag": LayoutKind(_zigzag),
    "striped": LayoutKind(_striped, recurrent=False),
    "contiguous_per_document": LayoutKind(_contiguous_per_document, per_document=True),
    "zigzag_per_document": LayoutKind(_zigzag_per_document, per_document=True),
}


def layout_kind(name: str) -> LayoutKind:
    """The entry of `LAYOUTS`, or a `UserError` that names the nearest."""
    if name not in LAYOUTS:
        near = difflib.get_close_matches(name, LAYOUTS, 1)
        remedy = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(LAYOUTS)}."
        raise UserError(f"parallel.layout {name!r} is no layout; {remedy}")
    return LAYOUTS[name]


def check_recurrent(name: str) -> None:
    """Refuse a layout on which a recurrence is legal, but would pass one state a stripe."""
    if name in LAYOUTS and not LAYOUTS[name].recurrent:
        serve = ", ".join(other for other, kind in LAYOUTS.items() if kind.recurrent)
        raise UserError(
            f"parallel.layout {name!r} cuts the stream into many stripes, and a recurrence would hand on a state at each; "
            f"use {serve} for a model with recurrent layers."
        )
