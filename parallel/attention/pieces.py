"""Which keys of one rank the queries of another see: work items for any layout, mask and table of documents.

Host integers only. A *run* is a stretch of consecutive tokens of one document, held in consecutive rows. One loop over
runs serves every layout; neighbours are merged, so that the number of kernel calls stays near that of the runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longhaul.models.ops.attention import Mask, Piece
from longhaul.models.ops.segments import Documents, Segments
from longhaul.parallel.layout import SequenceLayout


class Run(NamedTuple):
    """Rows `start .. stop` hold tokens `first ..` of the stream, all of one document.

    Tokens before the stream (an incoming state) have negative numbers and belong to document 0.
    """

    start: int
    stop: int
    document: int
    first: int

    @property
    def last(self) -> int:
        return self.first + self.stop - self.start - 1


class Held(NamedTuple):
    """What a holder has: its runs, and which of whose rows stand where.

    Attributes:
        num_tokens: rows.
        runs: in row order.
        sources: (member, start, stop): the rows' origin among the members' own rows, in row order.
    """

    num_tokens: int
    runs: list[Run]
    sources: list[tuple[int, int, int]]


def held_by(layout: SequenceLayout, documents: Documents, ranks: Sequence[int]) -> Held:
    """The tokens of some ranks together, in stream order."""
    offsets = {rank: _offsets(layout, rank) for rank in ranks}
    ranges = [(*part, rank, slot) for rank in ranks for slot, part in enumerate(layout.parts[rank])]
    order = [(rank, slot) for _, _, rank, slot in sorted(ranges)]
    segments = Segments(documents, [layout.parts[rank][slot] for rank, slot in order])
    runs: list[Run] = []
    for s, document in enumerate(segments.document_of):
        start, stop, part = segments.bounds[s], segments.bounds[s + 1], segments.part_of[s]
        first = segments.part_starts[part] + start - segments.part_bounds[part]
        if runs and (runs[-1].document, runs[-1].last + 1) == (document, first):
            runs[-1] = runs[-1]._replace(stop=stop)
        else:
            runs.append(Run(start, stop, document, first))
    member = {rank: index for index, rank in enumerate(ranks)}
    sources = [(member[rank], *offsets[rank][slot]) for rank, slot in order]
    return Held(segments.num_tokens, runs, sources)


def _offsets(layout: SequenceLayout, rank: int) -> list[tuple[int, int]]:
    """Rows of each part among its rank's own rows."""
    rows, token = [], 0
    for start, stop in layout.parts[rank]:
        rows.append((token, token + stop - start))
        token += stop - start
    return rows


def past_runs(before: int) -> list[Run]:
    """The `before` tokens of an incoming state."""
    return [Run(0, before, 0, -before)] if before else []


class _Keys(NamedTuple):
    """Rows of keys against which one run of queries stands.

    Attributes:
        whole: no window hides any of them.
        own: the last of them are the queries' own tokens.
        seamless: consecutive tokens.
        last: number of the last token.
    """

    start: int
    stop: int
    whole: bool
    own: bool
    seamless: bool
    last: int


def visible(queries: Sequence[Run], keys: Sequence[Run], mask: Mask) -> list[Piece]:
    """The pieces of `queries` against `keys`; rows of a piece are rows of the two."""
    table = by_document(keys)
    pieces: list[Piece] = []
    for query in queries:
        group: _Keys | None = None
        for key in table.get(query.document, ()):
            if not _meet(query, key, mask):
                continue
            following = _keys(query, key, mask)
            joined = None if group is None else _join(group, following)
            if group is not None and joined is None:
                _append(pieces, _piece(query, group, mask), mask)
            group = joined or following
        if group is not None:
            _append(pieces, _piece(query, group, mask), mask)
    return pieces


def needs(queries: Sequence[Run], keys: Mapping[int, Sequence[Run]], mask: Mask) -> bool:
    """Whether any of `queries` sees any of `keys`, which are given by document."""
    return any(_meet(query, key, mask) for query in queries for key in keys.get(query.document, ()))


def by_document(runs: Sequence[Run]) -> dict[int, list[Run]]:
    """The runs of each document, in order."""
    found: dict[int, list[Run]] = defaultdict(list)
    for run in runs:
        found[run.document].append(run)
    return found


def _meet(query: Run, key: Run, mask: Mask) -> bool:
    late = mask.causal and key.first > query.last
    return not late and (mask.window is None or key.last > query.first - mask.window)


def _keys(query: Run, key: Run, mask: Mask) -> _Keys:
    own = key.first == query.first
    assert own or key.last < query.first or key.first > query.last, "runs are the same tokens or have none in common"
    whole = mask.window is None or query.last - key.first < mask.window
    return _Keys(key.start, key.stop, whole, own, True, key.last)


def _join(a: _Keys, b: _Keys) -> _Keys | None:
    """Both as one, if a piece can say it: consecutive tokens in consecutive rows, or all within the window."""
    seamless = a.seamless and b.seamless and a.last + 1 == b.last - (b.stop - b.start - 1)
    if a.stop != b.start or not (seamless or a.whole):
        return None
    return _Keys(a.start, b.stop, a.whole, b.own, seamless, b.last)  # b is nearer than a, so whole if a is


def _piece(query: Run, keys: _Keys, mask: Mask) -> Piece:
    # The gap to the last key. Earlier keys of a merged piece may seem nearer than they are, but only where all are seen.
    return Piece(query.start, query.stop, keys.start, keys.stop, mask.causal and keys.own, query.last - keys.last)


def _append(pieces: list[Piece], piece: Piece, mask: Mask) -> None:
    """Single queries, each of which sees one key more than the one before it, are one causal piece (stripes of a token)."""
    if pieces and mask.causal and mask.window is None and piece.q_stop - piece.q_start == 1:
        before = pieces[-1]
        single = before.causal or before.q_stop - before.q_start == 1
        stairs = (before.q_stop, before.k_start, before.k_stop + 1) == (piece.q_start, piece.k_start, piece.k_stop)
        if single and stairs and (not before.causal or before.gap == 0):
            pieces[-1] = Piece(before.q_start, piece.q_stop, piece.k_start, piece.k_stop, True, 0)
            return
    pieces.append(piece)


def coordinates(runs: Sequence[Run], device: torch.device) -> tuple[Tensor, Tensor]:
    """Document and token number of every row, int64 [rows] each."""
    lengths = torch.tensor([run.stop - run.start for run in runs], dtype=torch.int64)
    rows = int(lengths.sum())

    def spread(values: Iterator[int]) -> Tensor:
        table = torch.tensor(list(values), dtype=torch.int64)
        return torch.repeat_interleave(table, lengths, output_size=rows)

    tokens = spread(run.first - run.start for run in runs) + torch.arange(rows)
    return spread(run.document for run in runs).to(device), tokens.to(device)


def seen(queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], mask: Mask) -> Tensor:
    """Which query sees which key, bool [Tq, Tk], from their coordinates."""
    same = queries[0][:, None] == keys[0]
    distance = queries[1][:, None] - keys[1]
    if mask.causal:
        same &= distance >= 0
    if mask.window is not None:
        same &= distance < mask.window
    return same
