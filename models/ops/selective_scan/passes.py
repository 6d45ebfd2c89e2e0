"""The passes of a chunked selective scan over its slabs; `chunk.py` says how they fit together, and the legend."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..affine import accumulate_dtype
from ..grid import ChunkGrid, chunk_grid
from ..recurrence import Inputs
from ..segments import Segments

SLAB_ELEMENTS = 1 << 17  # entries of one [m, K, D] temporary on a CPU: a few of them stay in cache
BACKWARD_ELEMENTS = 1 << 22  # entries of one [C, m, K, D] temporary of the backward
DEVICE_FACTOR = 32  # elsewhere a step is a kernel launch, so slabs are larger


class Chunks:
    """The inputs on the chunk grid.

    Args:
        x: (x [T, D], dt [T, D], A [D, K], B [T, K], C [T, K]).
        size: C.
    """

    def __init__(self, x: Inputs, segments: Segments, size: int) -> None:
        values, dt, A, B, C = x
        assert values is not None and dt is not None and A is not None and B is not None and C is not None
        self.dtype = accumulate_dtype(values.dtype)
        self.grid: ChunkGrid = chunk_grid(segments, size, values.device)
        self.x, self.dt, self.B, self.C = (self.grid.pad(tensor).to(self.dtype) for tensor in (values, dt, B, C))
        self.dtx = self.dt * self.x  # [M, C, D]
        self.A = A.to(self.dtype).mT.contiguous()  # [K, D]
        self.decay = (self.dt.sum(1)[:, None] * self.A).exp()  # [M, K, D], of a whole chunk
        self.factor = 1 if values.device.type == "cpu" else DEVICE_FACTOR
        self.starts = self._starts(segments)

    def _starts(self, segments: Segments) -> list[list[int]]:
        """For each position of a chunk, the chunks in which a document starts there."""

        def make() -> list[list[int]]:
            grid, starts = self.grid, [[] for _ in range(self.grid.size)]  # type: ignore[var-annotated]
            for bound, position, part in zip(segments.bounds, segments.position_of, segments.part_of):
                if position == 0:
                    chunk, offset = divmod(bound - segments.part_bounds[part], grid.size)
                    starts[offset].append(grid.part_chunks[part] + chunk)
            return starts

        return segments.cached(("starts", self.grid.size), make)

    def forget(self, h: Tensor, position: int, chunks: slice) -> None:
        """Zero the states [m, K, D] of the chunks in which a document starts at `position`."""
        for chunk in self.starts[position]:
            if chunks.start <= chunk < chunks.stop:
                h[chunk - chunks.start] = 0

    # States between chunks, [M + N, K, D]: chunk n of part p is entered by entry n + p and left by entry n + p + 1.
    def of_part(self, part: int) -> slice:
        return slice(self.grid.part_chunks[part], self.grid.part_chunks[part + 1])

    def zeros(self, count: int) -> Tensor:
        return self.x.new_zeros(count, *self.A.shape)

    def advance(self, n: int, state: Tensor, gain: Tensor) -> Tensor:
        """A state over chunk n, in either direction; only `gain` if a document starts inside."""
        return gain if self.grid.cuts[n] else torch.addcmul(gain, state, self.decay[n])

    def final_states(self, gains: Tensor, reverse: bool = False) -> Tensor:
        """What leaves each part with nothing entering, [N, K, D]."""
        final = self.zeros(self.grid.segments.num_parts)
        for part in range(final.shape[0]):
            chunks = range(*self.of_part(part).indices(self.grid.num_chunks))
            for n in reversed(chunks) if reverse else chunks:
                final[part] = self.advance(n, final[part], gains[n])
        return final

    def chunk_states(self, outer: Tensor, gains: Tensor, reverse: bool = False) -> Tensor:
        """States between chunks; `outer` [N, K, D] enters each part (from the right: `reverse`)."""
        states = self.zeros(self.grid.num_chunks + self.grid.segments.num_parts)
        for part in range(self.grid.segments.num_parts):
            chunks = range(*self.of_part(part).indices(self.grid.num_chunks))
            states[(chunks.stop if reverse else chunks.start) + part] = outer[part]
            for n in reversed(chunks) if reverse else chunks:
                here, there = (n + part + 1, n + part) if reverse else (n + part, n + part + 1)
                states[there] = self.advance(n, states[here], gains[n])
        return states

    def between(self, states: Tensor, chunks: slice, after: int) -> Tensor:
        """A copy of the states entering (`after` = 0) or leaving (1) some chunks, [m, K, D]."""
        if self.grid.segments.num_parts == 1:
            return states[chunks.start + after : chunks.stop + after].clone()
        lengths = [b - a for a, b in zip(self.grid.part_chunks, self.grid.part_chunks[1:])]
        part_of = [part for part, length in enumerate(lengths) for _ in range(length)]
        return states[[n + part_of[n] + after for n in range(chunks.start, chunks.stop)]]

    def slabs(self, elements: int = SLAB_ELEMENTS) -> Iterator[slice]:
        step, count = max(1, elements * self.factor // max(self.A.numel(), 1)), self.grid.num_chunks
        for n in range(0, count, step):
            yield slice(n, min(n + step, count))

    # Forward: 4 and 5 passes over [T, K, D].
    def gains(self) -> Tensor:
        """What each chunk adds to the state, [M, K, D]."""
        states = self.zeros(self.grid.num_chunks)
        for chunks in self.slabs():
            self._walk(chunks, states[chunks], None)
        return states

    def outputs(self, states: Tensor, out: Tensor) -> None:
        """Write the outputs [M, C, D], given the states between chunks."""
        for chunks in self.slabs():
            self._walk(chunks, self.between(states, chunks, 0), out)

    def _walk(self, chunks: slice, h: Tensor, out: Tensor | None) -> None:
        """Advance the states [m, K, D] of a slab, in place, through its positions."""
        dt, dtx, B, C = self.dt[chunks], self.dtx[chunks], self.B[chunks], self.C[chunks]
        decay = torch.empty_like(h)
        for i in range(self.grid.size):
            torch.mul(dt[:, i, None], self.A, out=decay).exp_()
            h.mul_(decay)
            self.forget(h, i, chunks)
            h.addcmul_(dtx[:, i, None], B[:, i, :, None])
            if out is not None:
                out[chunks, i] = (C[:, i, None] @ h)[:, 0]

    # Backward.
    def cotangent_gains(self, dy: Tensor) -> Tensor:
        """What each chunk's outputs say about the state entering it, [M, K, D]."""
        cotangents = self.zeros(self.grid.num_chunks)
        for chunks in self.slabs():
            dt, C, dout, g = self.dt[chunks], self.C[chunks], dy[chunks], cotangents[chunks]
            decay = torch.empty_like(g)
            for i in reversed(range(self.grid.size)):
                g.addcmul_(dout[:, i, None], C[:, i, :, None])
                g.mul_(torch.mul(dt[:, i, None], self.A, out=decay).exp_())
                self.forget(g, i, chunks)
        return cotangents

    def gradients(self, dy: Tensor, states: Tensor, G: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """dx, ddt [M, C, D], dA [K, D], dB, dC [M, C, K], given states and cotangents between chunks."""
        size = self.grid.size
        dx, ddt = torch.empty_like(self.x), torch.empty_like(self.dt)
        dA, dB, dC = torch.zeros_like(self.A), torch.empty_like(self.B), torch.empty_like(self.C)
        for chunks in self.slabs(min(SLAB_ELEMENTS, BACKWARD_ELEMENTS // size)):
            dt, dtx, B, C, dout = (t[chunks] for t in (self.dt, self.dtx, self.B, self.C, dy))
            h = self.between(states, chunks, 0)
            decays, carried = h.new_empty(size, *h.shape), h.new_empty(size, *h.shape)
            for i in range(size):
                torch.mul(dt[:, i, None], self.A, out=decays[i]).exp_()
                torch.mul(h, decays[i], out=carried[i])  # what token i finds: exp(dt A) h
                self.forget(carried[i], i, chunks)
                torch.addcmul(carried[i], dtx[:, i, None], B[:, i, :, None], out=h)
                dC[chunks, i] = (h @ dout[:, i, :, None])[..., 0]
            g = self.between(G, chunks, 1)
            q = torch.empty_like(g)
            for i in reversed(range(size)):
                g.addcmul_(dout[:, i, None], C[:, i, :, None])
                dB[chunks, i] = (g @ dtx[:, i, :, None])[..., 0]
                dx[chunks, i] = (B[:, i, None] @ g)[:, 0]  # of dt x, for now
                torch.mul(g, carried[i], out=q)
                ddt[chunks, i] = (q * self.A).sum(1)
                dA += (q * dt[:, i, None]).sum(0)
                g.mul_(decays[i])
                self.forget(g, i, chunks)
        ddt.addcmul_(dx, self.x)
        dx.mul_(self.dt)
        return dx, ddt, dA, dB, dC
