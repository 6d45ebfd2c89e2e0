"""The products of a chunked diagonal-decay recurrence; `chunk.py` says how they fit together, and the legend."""

from __future__ import annotations

import torch
from torch import Tensor

from ..affine import accumulate_dtype
from ..grid import ChunkGrid, chunk_grid
from ..recurrence import Inputs
from ..segments import Segments
from .reach import Reach, halves, pairs, reach_gradient

SLAB_ELEMENTS = 1 << 18  # entries of one [m, H, C, K] temporary: a few of them stay in cache, and memory stays bounded
DEVICE_SLAB_ELEMENTS = 1 << 24  # elsewhere a slab is a row of kernel launches


class Chunks:
    """The inputs on the chunk grid, heads before tokens.

    Args:
        x: (q [T, H, K], k [T, H, K], v [T, H, V], log_decay [T, H, K]).
        size: C, a power of two.
        read_before: queries read the state before their own token's update.
    """

    def __init__(self, x: Inputs, segments: Segments, size: int, read_before: bool) -> None:
        q, k, v, a = x
        assert q is not None and k is not None and v is not None and a is not None
        self.dtype, self.read_before = accumulate_dtype(v.dtype), read_before
        self.grid: ChunkGrid = chunk_grid(segments, size, v.device)
        self.q, self.k, self.v, self.a = (self.pad(tensor) for tensor in (q, k, v, a))
        self.total = self.a.sum(2)  # [M, H, K]
        self.decay = self.total.exp()[..., None]

    def pad(self, x: Tensor) -> Tensor:
        """[T, H, K] -> [M, H, C, K]."""
        return self.grid.pad(x).to(self.dtype).transpose(1, 2).contiguous()

    def unpad(self, x: Tensor) -> Tensor:
        """[M, H, C, K] -> [T, H, K]."""
        return self.grid.unpad(x.transpose(1, 2))

    def slabs(self) -> list[slice]:
        limit = SLAB_ELEMENTS if self.a.device.type == "cpu" else DEVICE_SLAB_ELEMENTS
        count, per_chunk = self.grid.num_chunks, self.a.shape[1] * self.grid.size * self.a.shape[3]
        step = max(1, limit // max(per_chunk, 1))
        return [slice(n, min(n + step, count)) for n in range(0, count, step)]

    # States: what enters and leaves chunks. Arrays over chunks have one more entry a part, so that chunk n of part p is
    # entered by entry n + p and left by entry n + p + 1.
    def of_part(self, part: int) -> range:
        return range(self.grid.part_chunks[part], self.grid.part_chunks[part + 1])

    def advance(self, n: int, state: Tensor, gain: Tensor) -> Tensor:
        """`diag(exp(total)) state + gain` over chunk n, in either direction; only `gain` if a document starts inside."""
        return gain if self.grid.cuts[n] else torch.addcmul(gain, state, self.decay[n])

    def final_states(self, gains: Tensor, reverse: bool = False) -> Tensor:
        """What leaves each part with nothing entering, [N, H, K, V]."""
        final = gains.new_zeros(self.grid.segments.num_parts, *gains.shape[1:])
        for part in range(final.shape[0]):
            for n in reversed(self.of_part(part)) if reverse else self.of_part(part):
                final[part] = self.advance(n, final[part], gains[n])
        return final

    def chunk_states(self, outer: Tensor, gains: Tensor, reverse: bool = False) -> Tensor:
        """States between chunks, [M + N, H, K, V]; `outer` [N, H, K, V] enters each part (from the right: `reverse`)."""
        num_parts = self.grid.segments.num_parts
        states = gains.new_empty(gains.shape[0] + num_parts, *gains.shape[1:])
        for part in range(num_parts):
            chunks = self.of_part(part)
            states[(chunks.stop if reverse else chunks.start) + part] = outer[part]
            for n in reversed(chunks) if reverse else chunks:
                here, there = (n + part + 1, n + part) if reverse else (n + part, n + part + 1)
                states[there] = self.advance(n, states[here], gains[n])
        return states

    def between(self, states: Tensor, chunks: slice, after: int) -> Tensor:
        """The states entering (`after` = 0) or leaving (1) some chunks, [m, H, K, V]."""
        if self.grid.segments.num_parts == 1:
            return states[chunks.start + after : chunks.stop + after]
        part_of = [part for part in range(self.grid.segments.num_parts) for _ in self.of_part(part)]
        return states[[n + part_of[n] + after for n in range(chunks.start, chunks.stop)]]

    # Masks, where a document starts inside one of the chunks.
    def cut(self, chunks: slice) -> bool:
        return any(self.grid.cuts[chunks])

    def mask_tokens(self, x: Tensor, keep: Tensor, chunks: slice) -> Tensor:
        """Zero the tokens that do not `keep` [M, C] to the entering or the leaving document; in place."""
        return x.masked_fill_(~keep[chunks, None, :, None], 0) if self.cut(chunks) else x

    def mask_pairs(self, scores: Tensor, chunks: slice) -> Tensor:
        """Zero the scores [m, H, C, C] between documents; in place."""
        return scores.masked_fill_(~self.grid.same[chunks, None], 0) if self.cut(chunks) else scores

    def head_decays(self, chunks: slice, reach: Reach) -> Tensor:
        """From the chunk's start to queries of the document that enters, else zero, [m, H, C, K]."""
        return self.mask_tokens(reach.query.exp(), self.grid.head, chunks)

    def tail_decays(self, chunks: slice, reach: Reach) -> Tensor:
        """From keys of the document that leaves to the chunk's end, else zero, [m, H, C, K]."""
        return self.mask_tokens(reach.key.exp(), self.grid.tail, chunks)

    def reach(self, chunks: slice) -> Reach:
        return Reach(self.a[chunks], self.read_before)

    # Forward.
    def summaries(self) -> Tensor:
        """What each chunk adds to the state, [M, H, K, V]."""
        U = self.v.new_empty(*self.k.shape[:2], self.k.shape[3], self.v.shape[3])
        for chunks in self.slabs():
            tail = self.tail_decays(chunks, self.reach(chunks).merge_all())
            torch.matmul(tail.mul_(self.k[chunks]).mT, self.v[chunks], out=U[chunks])
        return U

    def scores(self, chunks: slice, reach: Reach) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Weights [m, H, C, C] of values inside a chunk, and per level the decays of keys and queries."""
        q, k = self.q[chunks], self.k[chunks]
        scores = q.new_zeros(*q.shape[:3], q.shape[2])
        if not self.read_before:
            scores.diagonal(dim1=2, dim2=3).copy_((q * k).sum(-1))
        levels = []
        while reach.span < q.shape[2]:
            key, query = reach.decays()
            left, right = halves(k, reach.span)[0] * key, halves(q, reach.span)[1] * query  # [m, H, B, s, K]
            pairs(scores, reach.span).copy_(right @ left.mT)
            levels.append((key, query))
            reach.merge()
        return self.mask_pairs(scores, chunks), levels

    def intra(self) -> Tensor:
        """Outputs from keys of the same chunk, [M, H, C, V]."""
        out = torch.empty_like(self.v)
        for chunks in self.slabs():
            torch.matmul(self.scores(chunks, self.reach(chunks))[0], self.v[chunks], out=out[chunks])
        return out

    def add_inter(self, out: Tensor, states: Tensor) -> Tensor:
        """Add what the states entering the chunks contribute; in place."""
        for chunks in self.slabs():
            head = self.head_decays(chunks, self.reach(chunks).merge_all())
            out[chunks] += head.mul_(self.q[chunks]) @ self.between(states, chunks, 0)
        return out

    # Backward.
    def entry_cotangents(self, dO: Tensor) -> Tensor:
        """What each chunk's outputs say about the state entering it, [M, H, K, V]."""
        D = self.v.new_empty(*self.k.shape[:2], self.k.shape[3], self.v.shape[3])
        for chunks in self.slabs():
            head = self.head_decays(chunks, self.reach(chunks).merge_all())
            torch.matmul(head.mul_(self.q[chunks]).mT, dO[chunks], out=D[chunks])
        return D

    def local_gradients(self, dO: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients that need nothing from the right: all of dq, the intra-chunk shares of dk and dv, and what both say
        about the log decays."""
        dq, dk, dv, da = (torch.empty_like(tensor) for tensor in (self.q, self.k, self.v, self.a))
        for chunks in self.slabs():
            reach, dout = self.reach(chunks), dO[chunks]
            scores, levels = self.scores(chunks, reach)
            torch.matmul(scores.mT, dout, out=dv[chunks])
            dscores = self.mask_pairs(torch.matmul(dout, self.v[chunks].mT, out=scores), chunks)
            inter = (dout @ self.between(states, chunks, 0).mT).mul_(self.head_decays(chunks, reach))
            whole = inter * self.q[chunks]
            dq[chunks] = inter
            dk[chunks] = 0
            exponents = self._through_levels(dscores, levels, chunks, dq[chunks], dk[chunks])
            da[chunks] = reach_gradient(whole, exponents, self.read_before)
        return dq, dk, dv, da

    def _through_levels(
        self, dscores: Tensor, levels: list[tuple[Tensor, Tensor]], chunks: slice, dq: Tensor, dk: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Add to dq and dk, in place, and return per level the gradients of the decays' exponents."""
        q, k = self.q[chunks], self.k[chunks]
        if not self.read_before:
            diagonal = dscores.diagonal(dim1=2, dim2=3)[..., None]  # no decay lies between a token and itself
            dq.addcmul_(diagonal, k)
            dk.addcmul_(diagonal, q)
        exponents = []
        for level, (key, query) in enumerate(levels):
            s = 1 << level
            left, right = halves(k, s)[0], halves(q, s)[1]
            between = pairs(dscores, s).contiguous()  # [m, H, B, s, s]
            dleft = (between.mT @ (right * query)).mul_(key)
            dright = (between @ (left * key)).mul_(query)
            halves(dk, s)[0].add_(dleft)
            halves(dq, s)[1].add_(dright)
            exponents.append((dleft.mul_(left), dright.mul_(right)))
        return exponents

    def add_state_gradients(self, G: Tensor, states: Tensor, dk: Tensor, dv: Tensor, da: Tensor) -> None:
        """Add to dk, dv and da what the cotangents of the states leaving the chunks say; in place."""
        for chunks in self.slabs():
            leaving = self.between(G, chunks, 1)  # [m, H, K, V]
            tail = self.tail_decays(chunks, self.reach(chunks).merge_all())
            share = (self.v[chunks] @ leaving.mT).mul_(tail)
            dv[chunks] += tail.mul_(self.k[chunks]) @ leaving
            dk[chunks] += share
            # A key's way out passes all later tokens, and a state that passes through, every token of the chunk.
            da[chunks, :, 1:] += share.mul_(self.k[chunks])[:, :, :-1].cumsum(2)
            through = (leaving * self.between(states, chunks, 0)).sum(-1) * self.decay[chunks, ..., 0]  # [m, H, K]
            if self.cut(chunks):
                cuts = torch.tensor(self.grid.cuts[chunks], device=through.device)
                through.masked_fill_(cuts[:, None, None], 0)
            da[chunks] += through[:, :, None]
