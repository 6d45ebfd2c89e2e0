"""The scalar-decay recurrence token by token: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from ..segments import Segments


def scalar_decay(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, segments: Segments, S_in: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`S_t = exp(log_decay_t) S_{t-1} + k_t^T v_t`, `o_t = q_t S_t`, each document from zero.

    Args:
        q, k: [T, G, K]; key group g serves heads `g * H / G .. (g + 1) * H / G`.
        v: [T, H, V].
        log_decay: [T, H], [H] or None (no decay).
        S_in: the state entering each part, [N, H, K, V].

    Returns:
        [T, H, V] and the state leaving each part, [N, H, K, V].
    """
    num_tokens, num_heads, _ = v.shape
    q = q.repeat_interleave(num_heads // q.shape[1], dim=1)
    k = k.repeat_interleave(num_heads // k.shape[1], dim=1)
    if log_decay is None:
        log_decay = v.new_zeros(num_heads)
    decay = log_decay.expand(num_tokens, num_heads).exp()
    outputs, finals = [], []
    zero = v.new_zeros(num_heads, q.shape[2], v.shape[2])
    for part in range(segments.num_parts):
        S = zero if S_in is None or not segments.enters[part] else S_in[part]
        for s in segments.segments_of_part(part):
            if segments.position_of[s] == 0:
                S = zero
            for t in range(segments.bounds[s], segments.bounds[s + 1]):
                S = decay[t, :, None, None] * S + k[t, :, :, None] * v[t, :, None, :]
                outputs.append(torch.einsum("hk,hkv->hv", q[t], S))
        finals.append(S)
    return torch.stack(outputs) if outputs else v.sum() * 0 + torch.zeros_like(v), torch.stack(finals)
