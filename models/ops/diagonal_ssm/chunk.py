"""The diagonal state-space recurrence in chunks.

`s_t = exp(l) s_t-1 + x_t`, `y_t = sum_k c_k s_t` (its real part, if x is real), with constants l, c [D, K], complex: S4D
(Gu et al., arXiv 2206.11893), whose every channel has K states, and S5 (Smith et al., arXiv 2208.04933), whose K = 1 and
whose channels are the shared state itself. Within a row of C tokens all is a product with powers of exp(l), a Vandermonde
matrix E_n = exp(n l):

    y_i  = sum_{j <= i} (sum_k c_k E_{i-j}) x_j  +  sum_k c_k E_{i+1} S            S enters the row
    S'   = E_L S + sum_j E_{L-1-j} x_j                                             L tokens in the row

l and c are inputs without a token axis, so that their gradients come out; each rank's is the share of its own tokens. With G
the cotangent of S', the conjugate products give those of x and S, and dE collects what every use of a power says:
`dl = sum_n n conj(E_n) dE_n`. What the map of a whole part does is known from its length, so only states travel; that the
exchange multiplies by powers of l too needs no term of its own, because each part counts `<G, E_L S>` of its own rows.

Legend: T tokens, N parts, R rows, r rows of a slab, C tokens of a row, D channels, K states of a channel.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..affine import AffineMap, Constant, accumulate_dtype
from ..recurrence import ChunkedRecurrence, Inputs, Reverse, Saved, Summary
from ..segments import Segments
from .products import Products


class DiagonalSSM(ChunkedRecurrence):
    """Inputs `(x [T, D], log_decay [D, K], c [D, K])`, the latter two complex; state [D, K], complex.

    The outputs are real if x is, else complex.

    Args:
        chunk: C.
    """

    def __init__(self, chunk: int = 32) -> None:
        self.chunk = chunk

    def state_shape(self, x: Inputs) -> tuple[int, ...]:
        assert x[1] is not None
        return tuple(x[1].shape)

    def zero_state(self, x: Inputs, segments: Segments) -> Tensor:
        values, log_decay, _ = x
        assert values is not None and log_decay is not None
        dtype = accumulate_dtype(values.dtype).to_complex()
        return log_decay.new_zeros(segments.num_parts, *log_decay.shape, dtype=dtype)

    def flops_per_token(self, x: Inputs) -> int:
        channels, width = self.state_shape(x)
        return 12 * channels * width  # complex multiply (6), add (2), real read-out (4)

    def step(self, x_t: Inputs, state: Tensor) -> tuple[Tensor, Tensor]:
        x, log_decay, c = x_t
        assert x is not None and log_decay is not None and c is not None
        state = log_decay.to(state.dtype).exp() * state + x[0, :, None]
        y = (c.to(state.dtype) * state).sum(-1)
        return (y if x.is_complex() else y.real).to(x.dtype)[None], state

    def summarize(self, x: Inputs, segments: Segments) -> Summary:
        work = Products(x, segments, self.chunk)
        gains = work.gains()
        linear = Constant(work.log_decay, segments.part_lengths())
        return Summary(AffineMap(work.leaving(work.states(None, gains)), linear), scratch=(work, gains))

    def local(self, x: Inputs, segments: Segments, summary: Summary) -> Tensor:
        return summary.scratch[0].intra()

    def correct(self, out: Tensor, x: Inputs, segments: Segments, summary: Summary, S_in: Tensor) -> Tensor:
        work, gains = summary.scratch
        work.add_inter(out, work.states(S_in, gains))
        assert x[0] is not None
        return out[: segments.num_tokens].to(x[0].dtype)

    def reverse(self, x: Inputs, segments: Segments, saved: Saved, dout: Tensor) -> Reverse:
        work = Products(x, segments, self.chunk)
        dy = work.padded(dout)
        gains = work.cotangent_gains(dy)
        return Reverse(work.entering(work.cotangents(None, gains)), (work, dy, gains))

    def local_backward(
        self, x: Inputs, segments: Segments, saved: Saved, dout: Tensor, S_in: Tensor, reverse: Reverse
    ) -> Any:
        work, dy, gains = reverse.scratch
        states = work.states(S_in, work.gains())
        return work, gains, states, work.local_gradients(dy, states)

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
        work, gains, states, (dx, dE, dc) = partial
        work.add_state_gradients(dx, dE, states, work.cotangents(G_out, gains))
        found = dx[: segments.num_tokens], work.decay_gradient(dE), dc
        return tuple(grad.to(tensor.dtype) for grad, tensor in zip(found, x) if tensor is not None)
