"""The affine recurrence `h_t = A_t h_{t-1} + b_t` in chunks, as Newton's method asks for it: the state each token finds.

A is given, of either sign: diagonal [T, D] on states [D], or blocks [T, D, k, k] on states [D, k, 1]. Danieli et al.
(arXiv 2510.21450) solve each step of Newton's method on a non-linear recurrence with it; the Jacobians of their cells are
diagonal (ParaGRU) or 2 x 2 blocks (ParaLSTM).

The output is `p_t = h_{t-1}`, the state *before* token t (zero where a document starts): it is where the next step of Newton's
method linearises, and with it `h_t = A_t p_t + b_t` is token-local, so that a step needs no message but the exchange.

A document's first token is given A = 0 (nothing crosses it), so documents need no other care and no decay is divided by. The
maps then compose in two passes (`solve.py`). The backward is the same recurrence from the right,

    e_t = dp_t + A_t^T e_{t+1}     (nothing from a token that starts a document);     db_t = e_{t+1},  dA_t = e_{t+1} p_t^T

with e behind a part's last token the cotangent of what leaves it.

Legend: T tokens, N parts, D channels, k width of a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..affine import AffineMap, Dense, Linear, Scale, accumulate_dtype
from ..recurrence import ChunkedRecurrence, Inputs, Reverse, Saved, Summary
from ..segments import Segments
from .solve import Solver


class AffineScan(ChunkedRecurrence):
    """Inputs `(A [T, D], b [T, D])`, state [D]; or `(A [T, D, k, k], b [T, D, k, 1])`, state [D, k, 1].

    Args:
        chunk: tokens of a chunk, and of a chunk of chunks.
    """

    needs_out = True

    def __init__(self, chunk: int = 32) -> None:
        self.chunk = chunk

    def state_shape(self, x: Inputs) -> tuple[int, ...]:
        b = x[1]
        assert b is not None
        return tuple(b.shape[1:])

    def flops_per_token(self, x: Inputs) -> int:
        A = x[0]
        assert A is not None
        return 2 * A[0].numel()

    def step(self, x_t: Inputs, state: Tensor) -> tuple[Tensor, Tensor]:
        A, b = x_t
        assert A is not None and b is not None
        dtype = b.dtype
        A, b = A[0].to(state.dtype), b[0].to(state.dtype)
        return state[None].to(dtype), (A * state if A.shape == b.shape else A @ state) + b

    def summarize(self, x: Inputs, segments: Segments) -> Summary:
        A, b = _wide(x)
        solvers = _solvers(_forget(A, segments), b, segments, self.chunk)
        matrices, offsets = zip(*(solver.total() for solver in solvers))
        matrix, offset = _channels_first(torch.stack(matrices)), _channels_first(torch.stack(offsets))
        linear: Linear = Scale(matrix) if matrix.shape == offset.shape else Dense(matrix)
        return Summary(AffineMap(offset, linear), scratch=solvers)

    def local(self, x: Inputs, segments: Segments, summary: Summary) -> Tensor:
        assert x[1] is not None
        return torch.empty_like(x[1])

    def correct(self, out: Tensor, x: Inputs, segments: Segments, summary: Summary, S_in: Tensor) -> Tensor:
        for part, solver in enumerate(summary.scratch):
            start, stop = segments.part_bounds[part : part + 2]
            out[start:stop] = _found(solver, S_in[part])
        return _forget(out, segments)

    def reverse(self, x: Inputs, segments: Segments, saved: Saved, dout: Tensor) -> Reverse:
        A, dp = _wide((x[0], dout))
        adjoint = _forget(A if A.shape == dp.shape else A.mT, segments)
        solvers = _solvers(adjoint, _forget(dp, segments), segments, self.chunk, reverse=True)
        return Reverse(_channels_first(torch.stack([solver.total()[1] for solver in solvers])), solvers)

    def local_backward(
        self, x: Inputs, segments: Segments, saved: Saved, dout: Tensor, S_in: Tensor, reverse: Reverse
    ) -> Any:
        return reverse.scratch

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
        A, b = x
        assert A is not None and b is not None and out is not None
        db = G_out.new_empty(b.shape)
        for part, solver in enumerate(partial):
            start, stop = segments.part_bounds[part : part + 2]
            db[start:stop] = _found(solver, G_out[part]).flip(0)
        p = out.to(db.dtype)
        return (db * p if A.shape == b.shape else db * p.mT).to(A.dtype), db.to(b.dtype)


def _wide(x: Inputs) -> tuple[Tensor, Tensor]:
    first, second = x
    assert first is not None and second is not None
    return first.to(accumulate_dtype(first.dtype)), second.to(accumulate_dtype(second.dtype))


def _channels_first(x: Tensor) -> Tensor:
    """[n, ..., D] -> [n, D, ...], as states are outside of the solver."""
    return x.movedim(-1, 1).contiguous()


def _found(solver: Solver, entering: Tensor) -> Tensor:
    """The state each token of a part finds, [n, *state_shape]."""
    return solver.found(entering.movedim(0, -1)).movedim(-1, 1)


def _forget(x: Tensor, segments: Segments) -> Tensor:
    """`x` [T, ...] with zeros where a document starts."""
    starts = segments.positions(x.device) == 0
    return x.masked_fill(starts.reshape(-1, *(1,) * (x.dim() - 1)), 0)


def _solvers(A: Tensor, b: Tensor, segments: Segments, chunk: int, reverse: bool = False) -> list[Solver]:
    """One a part; from the right if `reverse`."""
    solvers = []
    for start, stop in zip(segments.part_bounds, segments.part_bounds[1:]):
        own = A[start:stop].movedim(1, -1), b[start:stop].movedim(1, -1)
        solvers.append(Solver(*((own[0].flip(0), own[1].flip(0)) if reverse else own), chunk))
    return solvers
