"""The products of a chunked delta rule; `chunk.py` says how they fit together, and the legend."""

from __future__ import annotations

import torch
from torch import Tensor

from ..affine import accumulate_dtype
from ..grid import ChunkGrid, chunk_grid
from ..recurrence import Inputs
from ..segments import Segments
from .decays import ChannelDecays, HeadDecays

CPU_SLAB, DEVICE_SLAB = 1 << 18, 1 << 24  # entries of one [m, H, C, C] temporary: a cache holds it; elsewhere, few launches


class Chunks:
    """The inputs on the chunk grid, heads before tokens.

    Args:
        x: (q, k [T, H, K], v [T, H, V], b [T, H, K], e [T, H, K] or None, log_decay [T, H], [T, H, K] or None).
        size: C.
    """

    def __init__(self, x: Inputs, segments: Segments, size: int) -> None:
        q, k, v, b, e, log_decay = x
        assert q is not None and k is not None and v is not None and b is not None
        self.dtype = accumulate_dtype(v.dtype)
        self.grid: ChunkGrid = chunk_grid(segments, size, v.device)
        self.heads = v.shape[1]
        self.q, self.k, self.v, self.b = (self.pad(tensor) for tensor in (q, k, v, b))
        self.e = None if e is None else self.pad(e)
        # The writes and what they write: e writes Z, found by a triangular solve; k writes v (if it is not e that does).
        self.writes = [self.k] if self.e is None else [self.e, self.k]
        self.c: Tensor | None = None  # [M, H, C, 1 or K]
        head, tail = (mask[:, None, :, None].to(self.dtype) for mask in (self.grid.head, self.grid.tail))
        if log_decay is None:
            self.enter, self.leave = head, tail  # [M, 1, C, 1]
            self.keep = self.v.new_ones(())
        else:
            # A product with the mask sums inside each document; a running sum would mix their roundings.
            log_decay = log_decay[..., None] if log_decay.dim() == 2 else log_decay
            self.c = self.same[:, None].to(self.dtype) @ self.pad(log_decay)
            last = self.c[:, :, -1:]
            self.enter, self.leave = head * self.c.exp(), tail * (last - self.c).clamp_max(0).exp()
            self.keep = last.mT.exp()  # [M, H, 1 or K, 1]

    @property
    def same(self) -> Tensor:
        return self.grid.same

    def pad(self, x: Tensor) -> Tensor:
        """[T, H, W] -> [M, H, C, W]."""
        return self.grid.pad(x).to(self.dtype).transpose(1, 2).contiguous()

    def unpad(self, x: Tensor) -> Tensor:
        """[M, H, C, W] -> [T, H, W]."""
        return self.grid.unpad(x.transpose(1, 2))

    def slabs(self) -> list[slice]:
        count = self.grid.num_chunks
        budget = CPU_SLAB if self.v.device.type == "cpu" else DEVICE_SLAB
        step = max(1, budget // (self.heads * self.grid.size**2))
        return [slice(n, min(n + step, count)) for n in range(0, count, step)]

    def empty(self, *shape: int) -> Tensor:
        """[M, H, *shape]."""
        return self.v.new_empty(self.grid.num_chunks, self.heads, *shape)

    # What enters and leaves chunks. Arrays over chunks have one more entry a part, so that chunk n of part p is entered by
    # entry n + p and left by entry n + p + 1.
    def of_part(self, part: int) -> range:
        return range(self.grid.part_chunks[part], self.grid.part_chunks[part + 1])

    def final_maps(self, matrices: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
        """The map of each part: M [N, H, K, K] (of no meaning if a document starts inside) and U [N, H, K, V]."""
        width_k, width_v = gains.shape[2:]
        unit = torch.eye(width_k, dtype=self.dtype, device=self.v.device).expand(self.heads, -1, -1)
        start = torch.cat([unit.new_zeros(self.heads, width_k, width_v), unit], dim=-1)  # [0, 1] becomes [U, M]
        finals = []
        for part in range(self.grid.segments.num_parts):
            state = start
            if self.grid.segments.cuts[part]:
                state = state[..., :width_v]
            for n in self.of_part(part):
                if self.grid.cuts[n]:
                    state = gains[n]
                else:
                    state = matrices[n] @ state
                    state[..., :width_v] += gains[n]
            finals.append(torch.cat([state, unit], dim=-1) if state.shape[-1] == width_v else state)
        U, M = torch.stack(finals).split([width_v, width_k], dim=-1)
        return M.contiguous(), U.contiguous()

    def final_states(self, matrices: Tensor, gains: Tensor) -> Tensor:
        """What leaves each part at its left end with nothing entering, [N, H, K, V]; `matrices` are adjoint already."""
        final = gains.new_zeros(self.grid.segments.num_parts, *gains.shape[1:])
        for part in range(final.shape[0]):
            for n in reversed(self.of_part(part)):
                final[part] = gains[n] if self.grid.cuts[n] else torch.baddbmm(gains[n], matrices[n], final[part])
        return final

    def chunk_states(self, outer: Tensor, matrices: Tensor, gains: Tensor, reverse: bool = False) -> Tensor:
        """States between chunks, [M + N, H, K, V]; `outer` [N, H, K, V] enters each part (from the right: `reverse`)."""
        num_parts = self.grid.segments.num_parts
        states = gains.new_empty(gains.shape[0] + num_parts, *gains.shape[1:])
        for part in range(num_parts):
            chunks = self.of_part(part)
            states[(chunks.stop if reverse else chunks.start) + part] = outer[part]
            for n in reversed(chunks) if reverse else chunks:
                here, there = (n + part + 1, n + part) if reverse else (n + part, n + part + 1)
                if self.grid.cuts[n]:
                    states[there] = gains[n]
                else:
                    torch.baddbmm(gains[n], matrices[n], states[here], out=states[there])
        return states

    def between(self, states: Tensor, chunks: slice, after: int) -> Tensor:
        """The states entering (`after` = 0) or leaving (1) some chunks, [m, H, K, V]."""
        if self.grid.segments.num_parts == 1:
            return states[chunks.start + after : chunks.stop + after]
        part_of = [part for part in range(self.grid.segments.num_parts) for _ in self.of_part(part)]
        return states[[n + part_of[n] + after for n in range(chunks.start, chunks.stop)]]

    # Products inside chunks.
    def decays(self, chunks: slice) -> HeadDecays | ChannelDecays:
        same = self.same[chunks, None]
        if self.c is None:
            return HeadDecays(None, same, self.dtype)
        c = self.c[chunks]
        return HeadDecays(c, same, self.dtype) if c.shape[-1] == 1 else ChannelDecays(c, same)

    def scores(self, decays: HeadDecays | ChannelDecays, chunks: slice) -> tuple[list[Tensor], list[Tensor]]:
        """Scores of the reads b (of earlier writes only) and q, one [m, H, C, C] for each of `writes`.

        That of b and e comes negated, `-A_be`, as `solve_triangular` wants the unit triangular system `1 - A_be`.
        """
        by_b, by_q = decays.scores([self.b[chunks], self.q[chunks]], [write[chunks] for write in self.writes])
        by_b = [score.tril_(-1) for score in by_b]
        by_b[0].neg_()
        return by_b, by_q

    def transfer(self, left: Tensor, right: Tensor, chunks: slice) -> Tensor:
        """`diag(exp(c_C)) + left^T right`, [m, H, K, K]; of no meaning where a document starts inside."""
        matrices = left.mT @ right
        keep = self.keep if self.keep.dim() == 0 else self.keep[chunks, ..., 0]
        matrices.diagonal(dim1=-2, dim2=-1).add_(keep)
        return matrices
