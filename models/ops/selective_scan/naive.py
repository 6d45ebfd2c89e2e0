"""The selective scan token by token: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from ..segments import Segments


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, segments: Segments, S_in: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`h_t = exp(dt_t A) h_t-1 + (dt_t x_t) B_t`, `y_t = h_t C_t`, each document from zero.

    Args:
        x, dt: [T, D].
        A: [D, K], negative.
        B, C: [T, K].
        S_in: the state entering each part, [N, D, K].

    Returns:
        [T, D] and the state leaving each part, [N, D, K].
    """
    outputs, finals = [], []
    zero = x.new_zeros(A.shape)
    for part in range(segments.num_parts):
        h = zero if S_in is None or not segments.enters[part] else S_in[part]
        for s in segments.segments_of_part(part):
            if segments.position_of[s] == 0:
                h = zero
            for t in range(segments.bounds[s], segments.bounds[s + 1]):
                h = (dt[t, :, None] * A).exp() * h + (dt[t] * x[t])[:, None] * B[t]
                outputs.append(h @ C[t])
        finals.append(h)
    return torch.stack(outputs) if outputs else x.sum() * 0 + torch.zeros_like(x), torch.stack(finals)
