"""The selective scan in chunks.

`h_t = exp(dt_t A) h_t-1 + (dt_t x_t) B_t`, `y_t = h_t C_t` with a state [D, K] in which every entry decays by itself: Mamba-1
(Gu & Dao, arXiv 2312.00752, algorithm 2). No product of matrices computes it, so the work is elementwise, and what counts is
how often [T, D, K] numbers are touched and that they are never all held.

All chunks advance side by side, one position of the chunk after the other (C steps, whatever the length): first from zero,
which gives what each chunk adds to the state; then the few chunk states are folded; then once more from the true states,
which gives the outputs. The backward does the same from the right and ends with one pass that has both the states h and
their cotangents g. Decays are applied one token at a time, so no product of them is ever divided by.

    g_t  = C_t dy_t + exp(dt_t+1 A) g_t+1         (nothing from a token that starts a document)
    q_t  = g_t exp(dt_t A) h_t-1                  what the decay of token t did
    ddt  = sum_k q A + x sum_k g B     dA = sum_t dt q     dx = dt sum_k g B     dB = sum_d g dt x     dC = sum_d h dy

g holds what comes from beyond the part, so the boundary term <S_out, G_out> of the decays is in q.

Outputs wait for the exchange, since a share of them from zero states would cost a pass of its own: a state is D K numbers,
a pass T D K.

Legend: T tokens, N parts, M chunks, C tokens of a chunk, m chunks of a slab, D channels, K state width. Inside, channels come
last ([K, D]), so that a broadcast runs along them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..affine import AffineMap, LogScale
from ..recurrence import ChunkedRecurrence, Inputs, Reverse, Saved, Summary
from ..segments import Segments
from .passes import Chunks


class SelectiveScan(ChunkedRecurrence):
    """Inputs `(x [T, D], dt [T, D], A [D, K], B [T, K], C [T, K])`, dt >= 0 and A < 0; state [D, K].

    A has no token axis: its gradient is the share of the tokens held here, as a parameter's is.

    Args:
        chunk: C.
    """

    def __init__(self, chunk: int = 32) -> None:
        self.chunk = chunk

    def state_shape(self, x: Inputs) -> tuple[int, ...]:
        A = x[2]
        assert A is not None
        return tuple(A.shape)

    def flops_per_token(self, x: Inputs) -> int:
        channels, width = self.state_shape(x)
        return 7 * channels * width  # decay (1, exp not counted) and multiply, outer product and add (3), read-out (2)

    def step(self, x_t: Inputs, state: Tensor) -> tuple[Tensor, Tensor]:
        x, dt, A, B, C = (tensor.to(state.dtype) for tensor in x_t if tensor is not None)
        decay = (dt[0, :, None] * A).exp()
        state = torch.addcmul(decay * state, (dt * x)[0, :, None], B)
        assert x_t[0] is not None
        return (state @ C[0]).to(x_t[0].dtype)[None], state

    def summarize(self, x: Inputs, segments: Segments) -> Summary:
        chunks = Chunks(x, segments, self.chunk)
        U = chunks.gains()
        final = chunks.final_states(U)
        log_decay = torch.stack([chunks.dt[chunks.of_part(part)].sum((0, 1)) for part in range(segments.num_parts)])
        maps = AffineMap(final.mT, LogScale((log_decay[:, None] * chunks.A).mT))
        return Summary(maps, saved=(U,), scratch=(chunks, U))

    def local(self, x: Inputs, segments: Segments, summary: Summary) -> Tensor:
        chunks, _ = summary.scratch
        return torch.empty_like(chunks.dt)

    def correct(self, out: Tensor, x: Inputs, segments: Segments, summary: Summary, S_in: Tensor) -> Tensor:
        chunks, U = summary.scratch
        chunks.outputs(chunks.chunk_states(S_in.mT, U), out)
        assert x[0] is not None
        return chunks.grid.unpad(out).to(x[0].dtype)

    def reverse(self, x: Inputs, segments: Segments, saved: Saved, dout: Tensor) -> Reverse:
        chunks = Chunks(x, segments, self.chunk)
        dy = chunks.grid.pad(dout).to(chunks.dtype)
        gains = chunks.cotangent_gains(dy)
        return Reverse(chunks.final_states(gains, reverse=True).mT, (chunks, dy, gains))

    def local_backward(
        self, x: Inputs, segments: Segments, saved: Saved, dout: Tensor, S_in: Tensor, reverse: Reverse
    ) -> Any:
        chunks, dy, gains = reverse.scratch
        U = saved[0]
        assert U is not None
        return chunks, dy, gains, chunks.chunk_states(S_in.mT, U)

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
        chunks, dy, gains, states = partial
        G = chunks.chunk_states(G_out.mT, gains, reverse=True)
        dx, ddt, dA, dB, dC = chunks.gradients(dy, states, G)
        unpad = chunks.grid.unpad
        found = (unpad(dx), unpad(ddt), dA.mT, unpad(dB), unpad(dC))
        return tuple(grad.to(tensor.dtype) for grad, tensor in zip(found, x) if tensor is not None)
