"""The diagonal-decay recurrence token by token: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from ..segments import Segments


def diagonal_decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    segments: Segments,
    S_in: Tensor | None = None,
    read_before: bool = False,
) -> tuple[Tensor, Tensor]:
    """`S_t = diag(exp(log_decay_t)) S_{t-1} + k_t^T v_t`, `o_t = q_t S_t`, each document from zero.

    Args:
        q, k, log_decay: [T, H, K].
        v: [T, H, V].
        S_in: the state entering each part, [N, H, K, V].
        read_before: `o_t = q_t S_{t-1}` instead.

    Returns:
        [T, H, V] and the state leaving each part, [N, H, K, V].
    """
    decay = log_decay.exp()
    outputs, finals = [], []
    zero = v.new_zeros(*k.shape[1:], v.shape[2])
    for part in range(segments.num_parts):
        S = zero if S_in is None or not segments.enters[part] else S_in[part]
        for s in segments.segments_of_part(part):
            if segments.position_of[s] == 0:
                S = zero
            for t in range(segments.bounds[s], segments.bounds[s + 1]):
                before = S
                S = decay[t, :, :, None] * S + k[t, :, :, None] * v[t, :, None, :]
                outputs.append(torch.einsum("hk,hkv->hv", q[t], before if read_before else S))
        finals.append(S)
    return torch.stack(outputs) if outputs else v.sum() * 0 + torch.zeros_like(v), torch.stack(finals)
