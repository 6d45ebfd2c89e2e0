"""The oracle: softmax attention with the whole score matrix, differentiable by autograd.

Legend: Tq queries, Tk keys, H heads, Hkv key heads (divides H), K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .mask import Piece


def visible(pieces: Sequence[Piece], num_queries: int, num_keys: int, window: int | None = None) -> Tensor:
    """Which query sees which key, bool [Tq, Tk], entry by entry from the definition."""
    seen = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    for piece in pieces:
        for query in range(piece.q_start, piece.q_stop):
            own = piece.k_stop - (piece.q_stop - piece.q_start) + (query - piece.q_start) + piece.gap
            for key in range(piece.k_start, piece.k_stop):
                too_late = piece.causal and key > own
                too_old = window is not None and key <= own - window
                seen[query, key] |= not too_late and not too_old
    return seen


def naive_attention(
    q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], scale: float, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of q [Tq, H, K] over k [Tk, Hkv, K], v [Tk, Hkv, V] -> out [Tq, H, V], lse [Tq, H]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    seen = visible(pieces, q.shape[0], k.shape[0], window).to(q.device)
    scores = torch.einsum("qhk,thk->qht", q, k) * scale
    scores = scores.masked_fill(~seen[:, None], float("-inf"))  # [Tq, H, Tk]
    blind = ~seen.any(dim=1)
    lse = scores.logsumexp(dim=-1) if k.shape[0] else q.new_full(q.shape[:2], float("-inf"))
    weights = (scores - lse.detach().masked_fill(blind[:, None], 0.0)[..., None]).exp()
    weights = weights / weights.sum(-1, keepdim=True).masked_fill(blind[:, None, None], 1.0)
    return torch.einsum("qht,thv->qhv", weights, v), lse
