"""The diagonal state-space recurrence token by token: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from ..segments import Segments


def diagonal_ssm(
    x: Tensor, log_decay: Tensor, c: Tensor, segments: Segments, S_in: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`s_t = exp(log_decay) s_t-1 + x_t`, `y_t = sum_k c_k s_t` (its real part, if x is real), each document from zero.

    Args:
        x: [T, D], real or complex.
        log_decay, c: complex [D, K].
        S_in: the state entering each part, complex [N, D, K].

    Returns:
        [T, D] and the state leaving each part, [N, D, K].
    """
    outputs, finals = [], []
    zero, decay = torch.zeros_like(log_decay), log_decay.exp()
    for part in range(segments.num_parts):
        state = zero if S_in is None or not segments.enters[part] else S_in[part]
        for s in segments.segments_of_part(part):
            if segments.position_of[s] == 0:
                state = zero
            for t in range(segments.bounds[s], segments.bounds[s + 1]):
                state = decay * state + x[t, :, None]
                y = (c * state).sum(-1)
                outputs.append(y if x.is_complex() else y.real)
        finals.append(state)
    return torch.stack(outputs) if outputs else x.sum() * 0 + torch.zeros_like(x), torch.stack(finals)
