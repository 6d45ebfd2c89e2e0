"""Tokens sorted by the memory they go to, in order of time inside each.

A *bucket* is what one part routes to one memory. Buckets stand one after the other, part by part and memory by memory, and
are parts themselves: `Buckets.segments` says which documents their rows belong to, so that any op over parts (a recurrence,
a convolution) runs on them as on any stream. A memory's stream of a document starts at the first token routed to it: a
document that starts in the part starts in the bucket, wherever its first row lies.

Legend: T tokens, N parts, E memories (a shared one included), k memories of a token (the shared one included), R = T k rows,
S segments of tokens, Q = N E buckets; bucket `part * E + memory`.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from ..segments import Segments


def choose(probabilities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of [T, M], divided by their sum, and which they are; of equal ones the first come first.

    Returns:
        Scores [T, k] (differentiable) and memories int64 [T, k].
    """
    ranked = probabilities.detach().sort(dim=-1, descending=True, stable=True).indices
    chosen = ranked[:, :k].contiguous()
    scores = probabilities.gather(1, chosen)
    return scores / scores.sum(-1, keepdim=True), chosen


def stable_order(keys: Tensor) -> Tensor:
    """Where the rows sorted by key come from; rows of one key keep their order, which is that of time."""
    return keys.argsort(stable=True)


class Buckets:
    """Which token goes where.

    Args:
        chosen: the memories of each token, all different, int64 [T, k].
        num_memories: E.

    Attributes:
        order: which choice (of the flattened `chosen`) each row is, [R]; `tokens`: which token; `memories`: which memory.
        sizes: rows of each bucket, Q of them.
        segments: the rows as parts (the buckets) and documents.
        last: rows of each bucket that belong to the last document of its part, [N][E].
        lost: [N, E]: a document starts in the part after the last row of the bucket, so nothing leaves the bucket. None if
            there is no such bucket.
    """

    def __init__(self, chosen: Tensor, num_memories: int, segments: Segments) -> None:
        device = chosen.device
        self.parent, self.num_memories, self.per_token = segments, num_memories, chosen.shape[1]
        segment_of, part_of = _owners(segments, device)
        self.order = stable_order((part_of[:, None] * num_memories + chosen).flatten())
        self.tokens = self.order // self.per_token
        self.memories = chosen.flatten()[self.order]
        cells = (segment_of[:, None] * num_memories + chosen).flatten()
        counts = cells.bincount(minlength=segments.num_segments * num_memories).tolist()  # the one wait for the device
        table = [counts[start : start + num_memories] for start in range(0, len(counts), num_memories)]  # [S][E]
        self.segments = BucketSegments(segments, table, num_memories)
        self.sizes = self.segments.part_lengths()
        self.last = [[0] * num_memories for _ in range(segments.num_parts)]
        for part, row in zip(segments.part_of, table):
            self.last[part] = row  # segments are in order, so that the last one stays
        gone = [[cut and count == 0 for count in row] for cut, row in zip(segments.cuts, self.last)]
        self.lost = torch.tensor(gone, device=device) if any(map(any, gone)) else None

    def combine(self, rows: Tensor, scores: Tensor) -> Tensor:
        """Each token's rows, weighted and summed: rows [R, ...], scores [T, k] -> [T, ...]."""
        back = torch.empty_like(self.order)
        back[self.order] = torch.arange(self.order.shape[0], device=self.order.device)
        each = rows[back].unflatten(0, (self.parent.num_tokens, self.per_token))  # [R, ...] -> [T, k, ...]
        return (each * scores.to(rows.dtype).reshape(*scores.shape, *(1,) * (rows.dim() - 1))).sum(1)


class BucketSegments(Segments):
    """Rows in buckets, as parts and pieces of documents.

    A row's position is at least the number of rows of its document before it in its memory, and 0 for the first one if the
    document starts in the part: enough to tell whether a state enters, and how far back a convolution may reach.

    Args:
        table: how many tokens of each segment go to each memory, [S][E].
    """

    def __init__(self, parent: Segments, table: list[list[int]], num_memories: int) -> None:
        pieces = sorted(
            (parent.part_of[s] * num_memories + memory, s, count)
            for s, row in enumerate(table)
            for memory, count in enumerate(row)
            if count
        )
        lengths = [0] * (parent.num_parts * num_memories)
        enters, cuts = [True] * len(lengths), [False] * len(lengths)
        for bucket, s, count in pieces:
            starts = parent.position_of[s] == 0
            if lengths[bucket] == 0:
                enters[bucket] = not starts
            cuts[bucket] = cuts[bucket] or starts
            lengths[bucket] += count
        self.documents = parent.documents
        self.num_parts, self.num_segments = len(lengths), len(pieces)
        self.part_bounds = (0, *accumulate(lengths))
        self.bounds = (0, *accumulate(count for _, _, count in pieces))
        self.num_tokens = self.bounds[-1]
        self.part_of = tuple(bucket for bucket, _, _ in pieces)
        self.document_of = tuple(parent.document_of[s] for _, s, _ in pieces)
        self.position_of = tuple(parent.position_of[s] for _, s, _ in pieces)
        self.enters, self.cuts = tuple(enters), tuple(cuts)
        self.part_starts = tuple(start for start in parent.part_starts for _ in range(num_memories))
        self._cache = {}


def _owners(segments: Segments, device: torch.device) -> tuple[Tensor, Tensor]:
    """The segment and the part of each token, int64 [T] each."""

    def make() -> tuple[Tensor, Tensor]:
        of_token = torch.arange(segments.num_segments).repeat_interleave(segments.lengths())
        parts = torch.tensor(segments.part_of, dtype=torch.int64)[of_token]
        return of_token.to(device), parts.to(device)

    return segments.cached(("routing", str(device)), make)
