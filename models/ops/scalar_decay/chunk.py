"""The scalar-decay recurrence in chunks.

`S_t = exp(a_t) S_{t-1} + k_t^T v_t`, `o_t = q_t S_t` with one log decay `a_t <= 0` per head: identity (basic linear
attention), constant (Lightning, Retention) or data-dependent (Mamba-2). The state-space dual form of Dao & Gu,
"Transformers are SSMs" (arXiv 2405.21060), section 6: products inside a chunk, chunk states, a recurrence over chunk
states, states to outputs.

Inside a chunk, with `c_i` the log decay summed from the chunk's (or the document's) first token to token i, inclusive,

    O_i   = sum_{j <= i} exp(c_i - c_j) (q_i . k_j) v_j  +  exp(c_i) q_i S_n              (head tokens only)
    S_n+1 = exp(c_C) S_n + sum_j exp(c_C - c_j) k_j^T v_j                                 (tail tokens only; no S_n if cut)

Differences are taken before `exp`, never `exp(-c_j)`. The gradient of a log decay `a_t` is the sum over all paths that cross
token t: from a key before it to a query at or after it, from the state that enters to a query, from a key to the state that
leaves, and from the one state to the other (the boundary term `exp(c_C) <G_n+1, S_n>`). The usual short form, a running sum
of `o_i . do_i - v_i . dv_i`, is the same number as a difference of much larger ones, and loses digits in fp32.

Legend: T tokens, N parts, M chunks, C tokens of a chunk, G key groups, R = H / G heads of a group, K key width, V value width.
Chunk states are held as [M, G, K, R, V], so that a group's heads share one product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..affine import AffineMap, Constant, Identity, Linear, LogScale
from ..recurrence import ChunkedRecurrence, Inputs, Reverse, Saved, Summary
from ..segments import Segments
from .products import Chunks


class ScalarDecay(ChunkedRecurrence):
    """Inputs `(q [T, G, K], k [T, G, K], v [T, H, V], log_decay [T, H] or None)`; state [H, K, V].

    Args:
        log_decay: a constant log decay per head, [H], for inputs without one; None is no decay.
        chunk: C.
    """

    def __init__(self, log_decay: Tensor | None = None, chunk: int = 64) -> None:
        self.constant, self.chunk = log_decay, chunk

    def state_shape(self, x: Inputs) -> tuple[int, ...]:
        _, k, v, _ = x
        assert k is not None and v is not None
        return v.shape[1], k.shape[2], v.shape[2]

    def flops_per_token(self, x: Inputs) -> int:
        heads, width_k, width_v = self.state_shape(x)
        return 5 * heads * width_k * width_v  # decay, outer product and add (3), read-out (2)

    def step(self, x_t: Inputs, state: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, log_decay = (None if tensor is None else tensor[0] for tensor in x_t)
        assert q is not None and k is not None and v is not None
        heads = v.shape[0]
        q, k = (tensor.to(state.dtype).repeat_interleave(heads // tensor.shape[0], dim=0) for tensor in (q, k))
        log_decay = self.constant if log_decay is None else log_decay
        if log_decay is not None:
            state = state * log_decay.to(state.dtype).exp()[:, None, None]
        state = torch.addcmul(state, k[:, :, None], v.to(state.dtype)[:, None, :])
        return torch.einsum("hk,hkv->hv", q, state).to(v.dtype)[None], state

    def summarize(self, x: Inputs, segments: Segments) -> Summary:
        chunks = Chunks(x, segments, self.constant, self.chunk)
        U = chunks.summaries()
        final = chunks.final_states(U)
        linear: Linear
        if chunks.c is None:
            linear = Identity()
        elif x[3] is None:
            assert self.constant is not None
            linear = Constant(self.constant.to(U.dtype), segments.part_lengths())
        else:
            per_chunk = chunks.c[:, -1]  # [M, H]
            parts = [per_chunk[chunks.of_part(part)].sum(0) for part in range(segments.num_parts)]
            linear = LogScale(torch.stack(parts))
        return Summary(AffineMap(chunks.to_state(final), linear), scratch=(chunks, U))

    def local(self, x: Inputs, segments: Segments, summary: Summary) -> Tensor:
        return summary.scratch[0].intra()

    def correct(self, out: Tensor, x: Inputs, segments: Segments, summary: Summary, S_in: Tensor) -> Tensor:
        chunks, U = summary.scratch
        chunks.add_inter(out, chunks.chunk_states(S_in, U))
        assert x[2] is not None
        return chunks.grid.unpad(out).to(x[2].dtype)

    def reverse(self, x: Inputs, segments: Segments, saved: Saved, dout: Tensor) -> Reverse:
        chunks = Chunks(x, segments, self.constant, self.chunk)
        dO = chunks.grid.pad(dout).to(chunks.dtype)
        D = chunks.entry_cotangents(dO)
        return Reverse(chunks.to_state(chunks.final_states(D, reverse=True)), (chunks, dO, D))

    def local_backward(
        self, x: Inputs, segments: Segments, saved: Saved, dout: Tensor, S_in: Tensor, reverse: Reverse
    ) -> Any:
        chunks, dO, D = reverse.scratch
        states = chunks.chunk_states(S_in, chunks.summaries())
        return chunks, D, states, chunks.local_gradients(dO, states, decay=x[3] is not None)

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
        chunks, D, states, (dq, dk, dv, dlog_decay) = partial
        chunks.add_state_gradients(chunks.chunk_states(G_out, D, reverse=True), states, dk, dv, dlog_decay)
        return tuple(
            None if tensor is None else chunks.grid.unpad(grad).to(tensor.dtype)
            for tensor, grad in zip(x, (dq, dk, dv, dlog_decay))
        )
