"""A regular grid of chunks over packed parts, with document boundaries as masks.

Chunked recurrences cut each part into chunks of C tokens (the last padded) and treat documents inside a chunk by masks, so
that any packing runs as the same few batched products. Masks multiply by exact zeros: no bit of one document reaches
another.

Legend: T tokens, N parts, M chunks, C tokens of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .segments import Segments


class ChunkGrid:
    """Chunks of `size` tokens over the parts of `segments`.

    Attributes:
        num_chunks: M, over all parts; `part_chunks[N + 1]` says where each part's chunks begin.
        cuts: [M] host flags: a document starts inside the chunk (at its first token counts).
        head: [M, C] tokens of the document that enters the chunk; `tail`: of the one that leaves it (padding included).
        same: [M, C, C] query i sees key j: same document and j <= i.
    """

    def __init__(self, segments: Segments, size: int, device: torch.device) -> None:
        self.segments, self.size = segments, size
        chunks = [-(-length // size) for length in segments.part_lengths()]
        self.part_chunks = [sum(chunks[:part]) for part in range(len(chunks) + 1)]
        self.num_chunks = self.part_chunks[-1]
        starts = torch.zeros(segments.num_tokens, dtype=torch.int32)
        first = [bound for bound, position in zip(segments.bounds, segments.position_of) if position == 0]
        starts[first] = 1
        index = self.pad(starts).cumsum(1)  # [M, C]: how many documents have started in the chunk so far
        self.cuts = (index[:, -1] > 0).tolist()
        index = index.to(device)
        self.head = index == 0
        self.tail = index == index[:, -1:]
        lower = torch.ones(size, size, dtype=torch.bool, device=device).tril()
        self.same = (index[:, :, None] == index[:, None, :]) & lower

    def pad(self, x: Tensor) -> Tensor:
        """[T, ...] -> [M, C, ...], zeros after each part's end."""
        bounds = self.segments.part_bounds
        if self.segments.num_parts == 1 and x.shape[0] == self.num_chunks * self.size:
            return x.reshape(self.num_chunks, self.size, *x.shape[1:])
        out = x.new_zeros(self.num_chunks * self.size, *x.shape[1:])
        for part, (start, stop) in enumerate(zip(bounds, bounds[1:])):
            offset = self.part_chunks[part] * self.size
            out[offset : offset + stop - start] = x[start:stop]
        return out.reshape(self.num_chunks, self.size, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        """[M, C, ...] -> [T, ...]."""
        flat = x.reshape(self.num_chunks * self.size, *x.shape[2:])
        bounds = self.segments.part_bounds
        if self.segments.num_parts == 1:
            return flat[: self.segments.num_tokens]
        offsets = [chunk * self.size for chunk in self.part_chunks]
        return torch.cat([flat[o : o + stop - start] for o, start, stop in zip(offsets, bounds, bounds[1:])])


def chunk_grid(segments: Segments, size: int, device: torch.device) -> ChunkGrid:
    """The grid of `segments`, made once for each size and device."""
    return segments.cached(("grid", size, str(device)), lambda: ChunkGrid(segments, size, device))
