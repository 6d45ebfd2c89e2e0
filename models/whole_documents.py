"""Losses over whole documents of a stream that runs in chunks.

A balance loss is a function of sums over a document, F(sum_t a_t). A chunk sees some of its tokens. The first pass, without
gradients, therefore adds up the sums of all chunks; a replay is given

    the whole sum  +  (own sum - own sum detached)

whose value is the document's and whose gradient reaches the chunk's own tokens: by the chain rule, the gradients of all chunks
add up to the whole stream's, for any F. A document's length and weight are the whole ones too.
"""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch import Tensor

from .ops import recompute
from .ops.segments import Documents
from .sequence import SequenceShard


class DocumentTotals:
    """Sums over each document of a stream, one table for each time a forward asks, in that order.

    Args:
        documents: of the stream.
        weights: of its tokens in the loss, [T].
    """

    def __init__(self, documents: Documents, weights: Tensor) -> None:
        self.documents = documents
        bounds = documents.bounds
        lengths = [stop - start for start, stop in zip(bounds, bounds[1:])]
        self.weights = torch.stack([part.sum(dtype=torch.float64) for part in weights.split(lengths)])
        self.lengths = torch.tensor(lengths)
        self.tables: list[Tensor] = []
        self.complete = False
        """All chunks have been added."""

    def shard(self, inner: SequenceShard, start: int) -> SequenceShard:
        """The part of a chunk that is held here, answering for whole documents; the chunk begins at token `start`."""
        return _ChunkShard(inner, self, bisect_right(self.documents.bounds, start) - 1)


class _ChunkShard(SequenceShard):
    """A chunk's shard; all but sums over documents are its own."""

    def __init__(self, inner: SequenceShard, totals: DocumentTotals, first: int) -> None:
        super().__init__(inner.segments, inner.device, inner.keep_state)
        self._inner, self._totals, self._asked = inner, totals, 0
        self._rows = slice(first, first + inner.documents.num_documents)
        for name in ("scan", "halo", "attend", "prefix", "document_sum", "share", "to_heads", "from_heads", "head_sum"):
            setattr(self, name, getattr(inner, name))

    def total(self, x: Tensor, per: str = "sequence") -> Tensor:
        own = self._inner.total(x, per)
        if per == "sequence":
            return own
        # A recomputed forward asks again, in another order: it is told what it was told the first time.
        known: Tensor = recompute.keep(lambda: self._next(own.detach()))
        return known + (own - own.detach())

    def _next(self, own: Tensor) -> Tensor:
        tables, index = self._totals.tables, self._asked
        self._asked += 1
        if self._totals.complete:
            return tables[index][self._rows]
        if index == len(tables):
            tables.append(own.new_zeros(self._totals.documents.num_documents, *own.shape[1:]))
        tables[index][self._rows] += own
        return own

    @property
    def document_lengths(self) -> Tensor:
        return self._totals.lengths[self._rows].to(self.device)

    def document_weights(self, weights: Tensor) -> Tensor:
        # Each rank counts a document by its share of the chunk's tokens: over ranks, once.
        shares = self._inner.document_weights(torch.ones_like(weights)) / self._inner.document_lengths
        return shares * self._totals.weights[self._rows].to(shares)

