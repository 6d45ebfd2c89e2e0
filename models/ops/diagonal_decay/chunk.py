"""The diagonal-decay recurrence in chunks.

`S_t = diag(exp(a_t)) S_{t-1} + k_t^T v_t`, `o_t = q_t S_t` with a log decay `a_t <= 0` per head and key channel: GLA
(Yang et al., arXiv 2312.06635), HGRN2, and RWKV-6, which reads before it writes (`o_t = q_t S_{t-1}`; its bonus on the
current token is local to the token and stays outside).

With c_i the log decay summed from the chunk's first token to token i, inclusive (exclusive for queries that read before),

    O_i   = sum_{j <= i} (q_i * exp(c_i - c_j)) . k_j v_j  +  (q_i * exp(c_i)) S_n             (head tokens only)
    S_n+1 = diag(exp(c_C)) S_n + sum_j (k_j * exp(c_C - c_j))^T v_j                            (tail tokens; no S_n if cut)

`reach.py` splits the decay between two tokens into two factors without overflow or cancellation. The gradient of a log
decay at token t is what all paths across t say, each added once: from keys before t to queries from t on, from the state
that enters to those queries, from those keys to the state that leaves, and from one state to the other. The last two are the
boundary term <S_out, G_out> of formulas that subtract `k dk` from `q dq`; those cancel where decays are strong.

Legend: T tokens, N parts, M chunks, C tokens of a chunk, H heads, K key width, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..affine import AffineMap, LogScale
from ..recurrence import ChunkedRecurrence, Inputs, Reverse, Saved, Summary
from ..segments import Segments
from .products import Chunks


class DiagonalDecay(ChunkedRecurrence):
    """Inputs `(q [T, H, K], k [T, H, K], v [T, H, V], log_decay [T, H, K])`; state [H, K, V].

    Args:
        read_before: outputs read the state before their own token's decay and update, `o_t = q_t S_{t-1}`.
        chunk: C, a power of two.
    """

    def __init__(self, read_before: bool = False, chunk: int = 64) -> None:
        if chunk < 1 or chunk & (chunk - 1):
            raise ValueError(f"The chunk of a diagonal decay must be a power of two, but is {chunk}.")
        self.read_before, self.chunk = read_before, chunk

    def state_shape(self, x: Inputs) -> tuple[int, ...]:
        _, k, v, _ = x
        assert k is not None and v is not None
        return k.shape[1], k.shape[2], v.shape[2]

    def flops_per_token(self, x: Inputs) -> int:
        heads, width_k, width_v = self.state_shape(x)
        return 5 * heads * width_k * width_v  # decay, outer product and add (3), read-out (2)

    def step(self, x_t: Inputs, state: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, a = (tensor[0].to(state.dtype) for tensor in x_t if tensor is not None)
        before = state
        state = torch.addcmul(state * a.exp()[:, :, None], k[:, :, None], v[:, None, :])
        out = torch.einsum("hk,hkv->hv", q, before if self.read_before else state)
        assert x_t[2] is not None
        return out.to(x_t[2].dtype)[None], state

    def _chunks(self, x: Inputs, segments: Segments) -> Chunks:
        return Chunks(x, segments, self.chunk, self.read_before)

    def summarize(self, x: Inputs, segments: Segments) -> Summary:
        chunks = self._chunks(x, segments)
        U = chunks.summaries()
        totals = [chunks.total[chunks.of_part(part)].sum(0) for part in range(segments.num_parts)]
        maps = AffineMap(chunks.final_states(U), LogScale(torch.stack(totals)))
        return Summary(maps, scratch=(chunks, U))

    def local(self, x: Inputs, segments: Segments, summary: Summary) -> Tensor:
        return summary.scratch[0].intra()

    def correct(self, out: Tensor, x: Inputs, segments: Segments, summary: Summary, S_in: Tensor) -> Tensor:
        chunks, U = summary.scratch
        chunks.add_inter(out, chunks.chunk_states(S_in, U))
        assert x[2] is not None
        return chunks.unpad(out).to(x[2].dtype)

    def reverse(self, x: Inputs, segments: Segments, saved: Saved, dout: Tensor) -> Reverse:
        chunks = self._chunks(x, segments)
        dO = chunks.pad(dout)
        D = chunks.entry_cotangents(dO)
        return Reverse(chunks.final_states(D, reverse=True), (chunks, dO, D))

    def local_backward(self, x: Inputs, segments: Segments, saved: Saved, dout: Tensor, S_in: Tensor, reverse: Reverse) -> Any:
        chunks, dO, D = reverse.scratch
        states = chunks.chunk_states(S_in, chunks.summaries())
        return chunks, D, states, chunks.local_gradients(dO, states)

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
        chunks, D, states, (dq, dk, dv, da) = partial
        G = chunks.chunk_states(G_out, D, reverse=True)
        chunks.add_state_gradients(G, states, dk, dv, da)
        return tuple(None if tensor is None else chunks.unpad(grad).to(tensor.dtype) for tensor, grad in zip(x, (dq, dk, dv, da)))
