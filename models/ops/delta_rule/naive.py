"""The delta rule token by token: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from ..segments import Segments


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    e: Tensor | None,
    log_decay: Tensor | None,
    segments: Segments,
    S_in: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`S' = diag(exp(log_decay_t)) S_{t-1}`, `S_t = S' + e_t^T (b_t S') + k_t^T v_t`, `o_t = q_t S_t`, each document from zero.

    Args:
        q, k, b: [T, H, K].
        v: [T, H, V].
        e: [T, H, K]; None is k.
        log_decay: [T, H], [T, H, K] or None (no decay).
        S_in: the state entering each part, [N, H, K, V].

    Returns:
        [T, H, V] and the state leaving each part, [N, H, K, V].
    """
    _, num_heads, width_k = k.shape
    e = k if e is None else e
    outputs, finals = [], []
    zero = v.new_zeros(num_heads, width_k, v.shape[2])
    for part in range(segments.num_parts):
        S = zero if S_in is None or not segments.enters[part] else S_in[part]
        for s in segments.segments_of_part(part):
            if segments.position_of[s] == 0:
                S = zero
            for t in range(segments.bounds[s], segments.bounds[s + 1]):
                if log_decay is not None:
                    S = log_decay[t].reshape(num_heads, -1, 1).exp() * S
                read = torch.einsum("hk,hkv->hv", b[t], S)
                S = S + e[t, :, :, None] * read[:, None, :] + k[t, :, :, None] * v[t, :, None, :]
                outputs.append(torch.einsum("hk,hkv->hv", q[t], S))
        finals.append(S)
    return torch.stack(outputs) if outputs else v.sum() * 0 + torch.zeros_like(v), torch.stack(finals)
