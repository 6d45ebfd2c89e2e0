"""The delta rule in chunks.

    S'_t = diag(exp(a_t)) S_{t-1},   S_t = S'_t + e_t^T (b_t S'_t) + k_t^T v_t,   o_t = q_t S_t

with log decays `a_t <= 0` per head, per key channel or none. It is every delta rule:

    DeltaNet, Gated DeltaNet, Kimi Delta    v <- beta v, b = -beta k, e = k (None): write what v has over its prediction
    RWKV-7, A_t = diag(w) + e^T b'          b = b' / w: the rule here decays first and reads then

Inside a chunk, with `c_i` the log decay summed from the chunk's (or the document's) first token to token i, inclusive, with
`A_rw` the scores of a read r = b, q and a write w = e, k (`decays.py`; b sees earlier writes only), and with the values Z that
e writes (Yang et al., arXiv 2406.06484, the WY form; arXiv 2412.06464 and 2510.26692 with decays),

    Z     = (1 - A_be)^-1 (A_bk V + b exp(c) S_n)      = Y + W S_n
    O     = q exp(c) S_n + A_qe Z + A_qk V             = O_0 + Q^ S_n
    S_n+1 = exp(c_C) S_n + (e exp(c_C - c))^T Z + (k exp(c_C - c))^T V  = M_n S_n + U_n

(head tokens read S_n, tail tokens write S_n+1). If e is k, V itself takes the place of `A_bk V` and Z already holds it, so that
terms with `k^T V` and `A_qk V` drop out. Chunk maps (M_n, U_n) are dense: a part's M is their product, [H, K, K].

Backward: with R and F_0 the transposed solves of `e exp(c_C - c)` and `A_qe^T dO`, M_n^T = exp(c_C) + (b exp(c))^T R and the
cotangent of Z before its solve is `F = F_0 + R G_n+1`: what no state is needed for comes first, what comes from the right last.
The gradient of `c_i` is `q dq + b db - e de - k dk` (summed over a head's channels if they share a decay), plus the boundary
term `<G_n+1, S_n+1>` at the chunk's last token. Kept for the backward: the inputs and S_in.

Legend: T tokens, N parts, M chunks, C tokens of a chunk, H heads, K key width, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..affine import AffineMap, Dense
from ..recurrence import ChunkedRecurrence, Inputs, Reverse, Saved, Summary
from ..segments import Segments
from .products import Chunks


def delta_inputs(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None) -> Inputs:
    """Inputs of `DeltaRule` for `S_t = (1 - beta_t k_t^T k_t) diag(exp(log_decay_t)) S_{t-1} + beta_t k_t^T v_t`.

    Args:
        q, k: [T, H, K]. v: [T, H, V]. beta: [T, H].
        log_decay: [T, H], [T, H, K] or None.
    """
    beta = beta[..., None].to(v.dtype)
    return q, k, beta * v, -beta * k, None, log_decay


class DeltaRule(ChunkedRecurrence):
    """Inputs `(q, k [T, H, K], v [T, H, V], b, e [T, H, K], log_decay [T, H] or [T, H, K])`; state [H, K, V].

    `e` None is k; `log_decay` None is no decay.

    Args:
        chunk: C, a power of two.
    """

    def __init__(self, chunk: int = 64) -> None:
        if chunk < 1 or chunk & (chunk - 1):
            raise ValueError(f"The chunk of a delta rule must be a power of two, but is {chunk}; try 64.")
        self.chunk = chunk

    def state_shape(self, x: Inputs) -> tuple[int, ...]:
        _, k, v, _, _, _ = x
        assert k is not None and v is not None
        return v.shape[1], k.shape[2], v.shape[2]

    def flops_per_token(self, x: Inputs) -> int:
        heads, width_k, width_v = self.state_shape(x)
        # Decay, read-out and read (2 each), e^T p and its add; k^T v and its add if e does not write v.
        return (7 if x[4] is None else 9) * heads * width_k * width_v

    def step(self, x_t: Inputs, state: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, b, e, log_decay = (None if tensor is None else tensor[0].to(state.dtype) for tensor in x_t)
        assert q is not None and k is not None and v is not None and b is not None and x_t[2] is not None
        if log_decay is not None:
            state = state * log_decay.reshape(state.shape[0], -1, 1).exp()
        read = (b[:, None] @ state).squeeze(1)  # [H, V]
        if e is None:
            state = torch.addcmul(state, k[..., None], (v + read)[:, None])
        else:
            state = torch.addcmul(state, k[..., None], v[:, None]).addcmul(e[..., None], read[:, None])
        return (q[:, None] @ state).to(x_t[2].dtype).transpose(0, 1), state

    def summarize(self, x: Inputs, segments: Segments) -> Summary:
        chunks = Chunks(x, segments, self.chunk)
        (width_k, width_v), size = (chunks.k.shape[3], chunks.v.shape[3]), self.chunk
        matrices, gains = chunks.empty(width_k, width_k), chunks.empty(width_k, width_v)
        solved, by_q = chunks.empty(size, width_k + width_v), [chunks.empty(size, size) for _ in chunks.writes]
        for slab in chunks.slabs():
            A_b, A_q = chunks.scores(chunks.decays(slab), slab)
            for kept, score in zip(by_q, A_q):
                kept[slab] = score
            values, leave = chunks.v[slab], chunks.leave[slab]
            X = values if chunks.e is None else A_b[1] @ values
            right = torch.cat([chunks.b[slab] * chunks.enter[slab], X], dim=-1)
            solved[slab] = torch.linalg.solve_triangular(A_b[0], right, upper=False, unitriangular=True)
            W, Y = solved[slab].split([width_k, width_v], dim=-1)
            e = chunks.writes[0][slab] * leave
            matrices[slab] = chunks.transfer(e, W, slab)
            gains[slab] = e.mT @ Y
            if chunks.e is not None:
                gains[slab] += (chunks.k[slab] * leave).mT @ values
        M, U = chunks.final_maps(matrices, gains)
        return Summary(AffineMap(U, Dense(M)), scratch=[chunks, matrices, gains, solved, by_q])

    def local(self, x: Inputs, segments: Segments, summary: Summary) -> Tensor:
        chunks, _, _, solved, by_q = summary.scratch
        out, width_v = torch.empty_like(chunks.v), chunks.v.shape[3]
        for slab in chunks.slabs():
            product = by_q[0][slab] @ solved[slab]  # [m, H, C, K + V]
            torch.addcmul(product[..., :-width_v], chunks.q[slab], chunks.enter[slab], out=solved[slab, ..., :-width_v])
            out[slab] = product[..., -width_v:]
            if chunks.e is not None:
                out[slab] += by_q[1][slab] @ chunks.v[slab]
        by_q.clear()
        return out

    def correct(self, out: Tensor, x: Inputs, segments: Segments, summary: Summary, S_in: Tensor) -> Tensor:
        chunks, matrices, gains, solved, _ = summary.scratch
        states, width_k = chunks.chunk_states(S_in, matrices, gains), chunks.k.shape[3]
        for slab in chunks.slabs():
            out[slab] += solved[slab, ..., :width_k] @ chunks.between(states, slab, 0)
        assert x[2] is not None
        return chunks.unpad(out).to(x[2].dtype)

    def reverse(self, x: Inputs, segments: Segments, saved: Saved, dout: Tensor) -> Reverse:
        chunks = Chunks(x, segments, self.chunk)
        dO = chunks.pad(dout)
        (width_k, width_v), size = (chunks.k.shape[3], chunks.v.shape[3]), self.chunk
        adjoints, gains = chunks.empty(width_k, width_k), chunks.empty(width_k, width_v)
        solved, by_b = chunks.empty(size, width_k + width_v), [chunks.empty(size, size) for _ in chunks.writes]
        dv = torch.empty_like(chunks.v)  # complete if e is not k but for what comes through Z
        for slab in chunks.slabs():
            A_b, A_q = chunks.scores(chunks.decays(slab), slab)
            right = torch.cat([chunks.writes[0][slab] * chunks.leave[slab], A_q[0].mT @ dO[slab]], dim=-1)
            for kept, score in zip(by_b, A_b):
                kept[slab] = score
            solved[slab] = torch.linalg.solve_triangular(A_b[0].mT, right, upper=True, unitriangular=True)
            R, F = solved[slab].split([width_k, width_v], dim=-1)
            b, q = (tensor[slab] * chunks.enter[slab] for tensor in (chunks.b, chunks.q))
            adjoints[slab] = chunks.transfer(b, R, slab)
            gains[slab] = b.mT @ F + q.mT @ dO[slab]
            if chunks.e is not None:
                dv[slab] = A_q[1].mT @ dO[slab]
        C = chunks.final_states(adjoints, gains)
        return Reverse(C, (chunks, dO, adjoints, gains, solved, by_b, dv))

    def local_backward(self, x: Inputs, segments: Segments, saved: Saved, dout: Tensor, S_in: Tensor, reverse: Reverse) -> Any:
        chunks, dO, adjoints, gains, solved, by_b, dv = reverse.scratch
        width_k = chunks.k.shape[3]
        X, U = chunks.v if chunks.e is None else torch.empty_like(chunks.v), torch.empty_like(gains)
        for slab in chunks.slabs():
            if chunks.e is not None:
                X[slab] = by_b[1][slab] @ chunks.v[slab]
            U[slab] = solved[slab, ..., :width_k].mT @ X[slab]
            if chunks.e is not None:
                U[slab] += (chunks.k[slab] * chunks.leave[slab]).mT @ chunks.v[slab]
        states = chunks.chunk_states(S_in, adjoints.mT, U)
        Z, dq = torch.empty_like(chunks.v), torch.empty_like(chunks.q)
        dwrites = [torch.empty_like(write) for write in chunks.writes]
        for slab in chunks.slabs():
            S, enter = chunks.between(states, slab, 0), chunks.enter[slab]
            right = X[slab] + (chunks.b[slab] * enter) @ S
            Z[slab] = torch.linalg.solve_triangular(by_b[0][slab], right, upper=False, unitriangular=True)
            dscores = [dO[slab] @ values.mT for values in ((Z[slab],) if chunks.e is None else (Z[slab], chunks.v[slab]))]
            writes = [write[slab] for write in chunks.writes]
            dq[slab], found = chunks.decays(slab).adjoint(dscores, chunks.q[slab], writes)
            dq[slab].addcmul_(dO[slab] @ S.mT, enter.expand_as(dq[slab]))
            for dwrite, gradient in zip(dwrites, found):
                dwrite[slab] = gradient
        return chunks, adjoints, gains, solved, by_b, states, Z, dq, dwrites, dv

    def correct_backward(
        self,
        x: Inputs,
        segments: Segments,
        saved: Saved,
        out: Tensor | None,
        dout: Tensor,
        S_in: Tensor,
        G_out: Tensor,
        partial: Any,
    ) -> tuple[Tensor | None, ...]:
        chunks, adjoints, gains, solved, by_b, states, Z, dq, dwrites, dv = partial
        width_k = chunks.k.shape[3]
        cotangents = chunks.chunk_states(G_out, adjoints, gains, reverse=True)
        db = torch.empty_like(chunks.b)
        for slab in chunks.slabs():
            S, G = chunks.between(states, slab, 0), chunks.between(cotangents, slab, 1)
            R, F = solved[slab, ..., :width_k], solved[slab, ..., width_k:]
            F = F + R @ G
            values = [Z[slab]] if chunks.e is None else [Z[slab], chunks.v[slab]]
            dscores = [(F @ value.mT).tril_(-1) for value in values]
            writes, enter, leave = [write[slab] for write in chunks.writes], chunks.enter[slab], chunks.leave[slab]
            db[slab], found = chunks.decays(slab).adjoint(dscores, chunks.b[slab], writes)
            db[slab].addcmul_(F @ S.mT, enter.expand_as(db[slab]))
            for dwrite, gradient, value in zip(dwrites, found, values):
                dwrite[slab] += gradient.addcmul_(value @ G.mT, leave.expand_as(gradient))
            if chunks.e is None:
                dv[slab] = F
            else:
                dv[slab] += (chunks.k[slab] * leave) @ G + by_b[1][slab].mT @ F
        dlog_decay = None
        if chunks.c is not None:
            dlog_decay = self._decay_gradients(chunks, dq, db, dwrites, states, cotangents)
        gradients = (dq, dwrites[-1], dv, db, None if chunks.e is None else dwrites[0], dlog_decay)
        return tuple(
            None if gradient is None or tensor is None else chunks.unpad(gradient).to(tensor.dtype).reshape(tensor.shape)
            for tensor, gradient in zip(x, gradients)
        )

    @staticmethod
    def _decay_gradients(
        chunks: Chunks, dq: Tensor, db: Tensor, dwrites: list[Tensor], states: Tensor, cotangents: Tensor
    ) -> Tensor:
        """Gradient of each token's log decay, [M, H, C, 1 or K]."""
        assert chunks.c is not None
        dc = chunks.q * dq
        dc.addcmul_(chunks.b, db)
        for write, dwrite in zip(chunks.writes, dwrites):
            dc.addcmul_(write, dwrite, value=-1)
        for slab in chunks.slabs():
            # <G, S> over the boundary: without it every decay of the chunk would miss what leaves the chunk.
            dc[slab, :, -1] += (chunks.between(cotangents, slab, 1) * chunks.between(states, slab, 1)).sum(-1)
        if chunks.c.shape[-1] == 1:
            dc = dc.sum(-1, keepdim=True)
        return chunks.same[:, None].to(chunks.dtype).mT @ dc
