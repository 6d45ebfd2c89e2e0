"""A recurrence token by token, affine or not: the oracle of one step of Newton's method, and of where its steps lead."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..segments import Segments


def recurrence(
    step: Callable[[Tensor, int], Tensor], zero: Tensor, segments: Segments, S_in: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`h_t = step(h_{t-1}, t)`, each document from zero.

    Args:
        step: from (a state, a local token) to the next state.
        zero: [*state_shape].
        S_in: the state entering each part, [N, *state_shape].

    Returns:
        The state that each token finds, [T, *state_shape], and the state leaving each part, [N, *state_shape].
    """
    found, finals = [], []
    for part in range(segments.num_parts):
        h = zero if S_in is None or not segments.enters[part] else S_in[part]
        for s in segments.segments_of_part(part):
            if segments.position_of[s] == 0:
                h = zero
            for t in range(segments.bounds[s], segments.bounds[s + 1]):
                found.append(h)
                h = step(h, t)
        finals.append(h)
    return torch.stack(found) if found else zero.new_zeros(0, *zero.shape), torch.stack(finals)


def affine_scan(A: Tensor, b: Tensor, segments: Segments, S_in: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`h_t = A_t h_{t-1} + b_t`, each document from zero.

    Args:
        A: [T, D], diagonal; or [T, D, k, k], blocks.
        b: [T, D]; or [T, D, k, 1].
        S_in: the state entering each part, [N, D]; or [N, D, k, 1].

    Returns:
        The state that each token finds, shaped like b, and the state leaving each part.
    """

    def step(h: Tensor, t: int) -> Tensor:
        return (A[t] * h if A.dim() == 2 else A[t] @ h) + b[t]

    return recurrence(step, torch.zeros_like(b[:1].sum(0)), segments, S_in)
