"""The products of a chunked scalar-decay recurrence; `chunk.py` says how they fit together, and the legend."""

from __future__ import annotations

import torch
from torch import Tensor

from ..affine import accumulate_dtype
from ..grid import ChunkGrid, chunk_grid
from ..recurrence import Inputs
from ..segments import Segments

SLAB_ELEMENTS = 1 << 20  # entries of one [m, H, C, C] temporary: it stays in cache, and memory stays bounded


class Chunks:
    """The inputs on the chunk grid.

    Args:
        x: (q [T, G, K], k [T, G, K], v [T, H, V], log_decay [T, H] or None).
        constant: the log decay where x has none, [H], or None.
        size: C.
    """

    def __init__(self, x: Inputs, segments: Segments, constant: Tensor | None, size: int) -> None:
        q, k, v, log_decay = x
        assert q is not None and k is not None and v is not None
        self.dtype = accumulate_dtype(v.dtype)
        self.grid: ChunkGrid = chunk_grid(segments, size, v.device)
        self.q, self.k, self.v = (self.grid.pad(tensor).to(self.dtype) for tensor in (q, k, v))
        self.groups, self.per_group = q.shape[1], v.shape[1] // q.shape[1]
        self.c: Tensor | None = None  # [M, C, H]
        self.shared: Tensor | None = None  # [H, C, C], decays inside any chunk, if they are constant
        if log_decay is None and constant is not None:
            constant = constant.to(self.dtype)
            log_decay = constant.expand(v.shape[0], v.shape[1])
            steps = torch.arange(size, dtype=self.dtype, device=v.device)
            self.shared = (constant[:, None, None] * (steps[:, None] - steps).clamp_min(0)).exp()
        if log_decay is not None:
            # A product with the mask sums inside each document; a running sum would mix their roundings.
            self.c = self.grid.same.to(self.dtype) @ self.grid.pad(log_decay).to(self.dtype)
            self.decay = self.c[:, -1].exp()  # [M, H]

    # States: what enters and leaves chunks. Arrays over chunks have one more entry a part, so that chunk n of part p is
    # entered by entry n + p and left by entry n + p + 1.
    def of_part(self, part: int) -> range:
        return range(self.grid.part_chunks[part], self.grid.part_chunks[part + 1])

    def zero_states(self, count: int) -> Tensor:
        return self.v.new_zeros(count, self.groups, self.k.shape[3], self.per_group, self.v.shape[3])

    def to_state(self, states: Tensor) -> Tensor:
        """[N, G, K, R, V] -> [N, H, K, V]."""
        return states.transpose(2, 3).flatten(1, 2)

    def from_state(self, states: Tensor) -> Tensor:
        """[N, H, K, V] -> [N, G, K, R, V]."""
        return states.to(self.dtype).unflatten(1, (self.groups, self.per_group)).transpose(2, 3)

    def advance(self, n: int, state: Tensor, gain: Tensor) -> Tensor:
        """`exp(c_C) state + gain` over chunk n, in either direction; only `gain` if a document starts inside."""
        if self.grid.cuts[n]:
            return gain
        if self.c is None:
            return state + gain
        return torch.addcmul(gain, state, self.decay[n].reshape(self.groups, 1, self.per_group, 1))

    def final_states(self, gains: Tensor, reverse: bool = False) -> Tensor:
        """What leaves each part with nothing entering, [N, G, K, R, V]."""
        final = self.zero_states(self.grid.segments.num_parts)
        for part in range(final.shape[0]):
            for n in reversed(self.of_part(part)) if reverse else self.of_part(part):
                final[part] = self.advance(n, final[part], gains[n])
        return final

    def chunk_states(self, outer: Tensor, gains: Tensor, reverse: bool = False) -> Tensor:
        """States between chunks, [M + N, G, K, R, V]; `outer` [N, H, K, V] enters each part (from the right: `reverse`)."""
        num_parts = self.grid.segments.num_parts
        states = gains.new_empty(gains.shape[0] + num_parts, *gains.shape[1:])
        start = self.from_state(outer)
        for part in range(num_parts):
            chunks = self.of_part(part)
            states[(chunks.stop if reverse else chunks.start) + part] = start[part]
            for n in reversed(chunks) if reverse else chunks:
                here, there = (n + part + 1, n + part) if reverse else (n + part, n + part + 1)
                states[there] = self.advance(n, states[here], gains[n])
        return states

    def between(self, states: Tensor, chunks: slice, after: int) -> Tensor:
        """The states entering (`after` = 0) or leaving (1) some chunks, [m, G, K, R, V]."""
        if self.grid.segments.num_parts == 1:
            return states[chunks.start + after : chunks.stop + after]
        part_of = [part for part in range(self.grid.segments.num_parts) for _ in self.of_part(part)]
        return states[[n + part_of[n] + after for n in range(chunks.start, chunks.stop)]]

    # Weights.
    def tail_weights(self) -> Tensor:
        """`exp(c_C - c_j)` of tail tokens, else zero, [M, C, H or 1, 1]."""
        tail = self.grid.tail[:, :, None]
        if self.c is None:
            return tail[..., None].to(self.dtype)
        # Masked before `exp`: across a document's end the difference may be large and positive.
        return (self.c[:, -1:] - self.c).masked_fill(~tail, float("-inf")).exp()[..., None]

    def head_weights(self) -> Tensor:
        """`exp(c_i)` of head tokens, else zero, [M, C, H or 1, 1]."""
        head = self.grid.head[:, :, None, None].to(self.dtype)
        return head if self.c is None else head * self.c.exp()[..., None]

    def decays(self, chunks: slice) -> Tensor:
        """`exp(c_i - c_j)` where query i sees key j, else zero, [m, H or 1, C, C]."""
        same = self.grid.same[chunks, None]
        if self.shared is not None:
            return same * self.shared
        if self.c is None:
            return same.to(self.dtype)
        c = self.c[chunks].transpose(1, 2)  # [m, C, H] -> [m, H, C]
        return (c[..., :, None] - c[..., None, :]).masked_fill_(~same, float("-inf")).exp_()

    def slabs(self) -> list[slice]:
        size, count = self.grid.size, self.grid.num_chunks
        step = max(1, SLAB_ELEMENTS // (self.v.shape[2] * size * size))
        return [slice(n, min(n + step, count)) for n in range(0, count, step)]

    # Layouts inside a product.
    def by_head(self, x: Tensor) -> Tensor:
        """[m, C, H, V] -> [m, G, R, C, V]."""
        return x.transpose(1, 2).unflatten(1, (self.groups, self.per_group))

    def from_head(self, x: Tensor) -> Tensor:
        """[m, G, R, C, V] -> [m, C, H, V]."""
        return x.flatten(1, 2).transpose(1, 2)

    def side_by_side(self, x: Tensor) -> Tensor:
        """[m, C, H, V] -> [m, G, C, R * V]: a group's heads in one product."""
        return x.unflatten(2, (self.groups, self.per_group)).transpose(1, 2).flatten(3)

    def from_side(self, x: Tensor) -> Tensor:
        """[m, G, C, R * V] -> [m, C, H, V]."""
        return x.unflatten(3, (self.per_group, -1)).transpose(1, 2).flatten(2, 3)

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """`sum_j left_j^T right_j`: [M, C, G, K], [M, C, H, V] -> [M, G, K, R, V]."""
        return (left.permute(0, 2, 3, 1) @ self.side_by_side(right)).unflatten(3, (self.per_group, -1))

    # Forward.
    def summaries(self) -> Tensor:
        """What each chunk adds to the state, [M, G, K, R, V]."""
        return self.outer(self.k, self.v * self.tail_weights())

    def intra(self) -> Tensor:
        """Outputs from keys of the same chunk, [M, C, H, V]."""
        out = torch.empty_like(self.v)
        for chunks in self.slabs():
            scores = self.q[chunks].transpose(1, 2) @ self.k[chunks].permute(0, 2, 3, 1)  # [m, G, C, C]
            out[chunks] = self._weigh(scores, self.decays(chunks), self.v[chunks])
        return out

    def _weigh(self, scores: Tensor, decays: Tensor, values: Tensor) -> Tensor:
        """[m, G, C, C], [m, H or 1, C, C], [m, C, H, V] -> [m, C, H, V]."""
        if self.c is None:
            return self.from_side((scores * decays) @ self.side_by_side(values))
        weights = scores[:, :, None] * decays.unflatten(1, (self.groups, self.per_group))
        return self.from_head(weights @ self.by_head(values))

    def add_inter(self, out: Tensor, states: Tensor) -> Tensor:
        """Add what the states entering the chunks contribute; in place."""
        weights = self.head_weights()
        for chunks in self.slabs():
            entering = self.between(states, chunks, 0).flatten(3)  # [m, G, K, R * V]
            product = self.from_side(self.q[chunks].transpose(1, 2) @ entering)
            out[chunks].addcmul_(product, weights[chunks].expand_as(product))
        return out

    # Backward.
    def entry_cotangents(self, dO: Tensor) -> Tensor:
        """What each chunk's outputs say about the state entering it, [M, G, K, R, V]."""
        return self.outer(self.q, dO * self.head_weights())

    def local_gradients(self, dO: Tensor, states: Tensor, decay: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients that need nothing from the right: dq, and the intra-chunk and entering shares of dk, dv, dlog_decay.

        The gradient of a decay is summed over the paths that cross its token, never as a difference of larger sums.
        """
        dq, dk, dv = torch.empty_like(self.q), torch.empty_like(self.k), torch.empty_like(self.v)
        dlog = self.v.new_empty(self.v.shape[:3]) if decay else None
        head = self.head_weights()
        for chunks in self.slabs():
            q, k = self.q[chunks].transpose(1, 2), self.k[chunks].transpose(1, 2)  # [m, G, C, K]
            decays = self.decays(chunks)
            scores, dout = q @ k.mT, dO[chunks]
            entering = self.between(states, chunks, 0).flatten(3)  # [m, G, K, R * V]
            weighted = dout * head[chunks]
            if self.c is None:
                weights = scores * decays
                dv[chunks] = self.from_side(weights.mT @ self.side_by_side(dout))
                dscores = (self.side_by_side(dout) @ self.side_by_side(self.v[chunks]).mT) * decays
            else:
                grouped = decays.unflatten(1, (self.groups, self.per_group))
                by_head = self.by_head(dout)
                per_head = (by_head @ self.by_head(self.v[chunks]).mT) * grouped  # [m, G, R, C, C]
                dscores = per_head.sum(2)
                dv[chunks] = self.from_head((scores[:, :, None] * grouped).mT @ by_head)
                if dlog is not None:
                    inter = (self.from_side(q @ entering) * weighted).sum(-1)  # [m, C, H], of each query
                    dlog[chunks] = self.same_document(chunks).mT @ inter
                    dlog[chunks] += self._crossing(per_head.mul_(scores[:, :, None]))
            dq[chunks] = (dscores @ k + self.side_by_side(weighted) @ entering.mT).transpose(1, 2)
            dk[chunks] = (dscores.mT @ q).transpose(1, 2)
        return dq, dk, dv, dlog

    def same_document(self, chunks: slice, strictly: bool = False) -> Tensor:
        """1 where key j <= i (or j < i: `strictly`) is of the same document, [m, C, C]."""
        same = self.grid.same[chunks].to(self.dtype)
        return same.tril(-1) if strictly else same

    def _crossing(self, paths: Tensor) -> Tensor:
        """Paths [m, G, R, C, C] from key j to query i, summed over those that cross token t, j < t <= i: [m, C, H]."""
        ones = paths.new_ones(self.grid.size, self.grid.size)
        return ((paths @ ones.triu(1)) * ones.tril()).sum(-2).flatten(1, 2).transpose(1, 2)

    def add_state_gradients(self, G: Tensor, states: Tensor, dk: Tensor, dv: Tensor, dlog: Tensor | None) -> None:
        """Add to dk, dv and dlog_decay what the cotangents of the states leaving the chunks say; in place."""
        tail = self.tail_weights()
        for chunks in self.slabs():
            leaving = self.between(G, chunks, 1)  # [m, G, K, R, V]
            product = self.from_side(self.k[chunks].transpose(1, 2) @ leaving.flatten(3)) * tail[chunks]
            dv[chunks] += product
            weighted = self.v[chunks] * tail[chunks]
            dk[chunks] += (self.side_by_side(weighted) @ leaving.flatten(3).mT).transpose(1, 2)
            if dlog is not None:
                # Keys reach the state that leaves past every later token of their document, ...
                dlog[chunks] += self.same_document(chunks, strictly=True) @ (product * self.v[chunks]).sum(-1)
                # ... and the state that enters reaches it past all tokens: the boundary term of the decay.
                passing = (leaving * self.between(states, chunks, 0)).sum((2, 4)).flatten(1) * self.decay[chunks]
                uncut = torch.tensor(self.grid.cuts[chunks], device=passing.device).logical_not()
                dlog[chunks] += (passing * uncut[:, None])[:, None]
