"""Softmax attention of one piece in plain torch, blocked over queries so that memory is bounded.

The twin of the fused kernels: any device, any dtype, key and value widths that differ, windows. It computes in at least
float32. The backward is the flash one: probabilities are rebuilt from the *final* lse, so it is right for a piece whose
output was merged with others (ring attention).

Legend: Tq queries, Tk keys, H heads, Hkv key heads, G = H / Hkv, K key width, V value width, B queries of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .mask import Piece

MAX_ROWS = 128  # G * B: measured best on a CPU; larger blocks fall out of cache
MAX_SCORES_BYTES = 64 << 20  # of one block; the backward holds two


def _blocks(
    piece: Piece, window: int | None, heads: int, key_heads: int, itemsize: int
) -> Iterator[tuple[slice, slice, int]]:
    """(queries, keys they may see, both local to the piece; own place of the first query among those keys)."""
    count, keys, own = piece.q_stop - piece.q_start, piece.k_stop - piece.k_start, piece.own - piece.k_start
    best = max(16, MAX_ROWS * key_heads // heads)
    step = max(1, min(best, MAX_SCORES_BYTES // (heads * keys * itemsize)))
    for start in range(0, count, step):
        stop = min(start + step, count)
        k_stop = min(keys, own + stop) if piece.causal else keys
        k_start = 0 if window is None else max(0, own + start - window + 1)
        yield slice(start, stop), slice(k_start, k_stop), own + start - k_start


def _hide(scores: Tensor, own: int, causal: bool, window: int | None, value: float) -> None:
    """Overwrite hidden entries of scores [Hkv, G, B, Tk]; only the columns that hold any are touched."""
    count, keys = scores.shape[-2:]
    first = own + torch.arange(count, device=scores.device)[:, None]  # [B, 1]
    if causal and own < keys - 1:
        low = max(own, 0)
        late = torch.arange(low, keys, device=scores.device) > first
        scores[..., low:].masked_fill_(late, value)
    if window is not None and own + count - window > 0:
        high = min(own + count - window, keys)
        old = torch.arange(high, device=scores.device) <= first - window
        scores[..., :high].masked_fill_(old, value)


def _by_head(x: Tensor, key_heads: int, dtype: torch.dtype) -> Tensor:
    """[B, H, K] -> [Hkv, G * B, K]."""
    rows, heads, width = x.shape
    grouped = x.reshape(rows, key_heads, heads // key_heads, width).permute(1, 2, 0, 3)
    return grouped.to(dtype).reshape(key_heads, -1, width)


def _by_token(x: Tensor, rows: int) -> Tensor:
    """[Hkv, G * B, K] -> [B, H, K]."""
    return x.unflatten(1, (-1, rows)).permute(2, 0, 1, 3).flatten(1, 2)


def forward(
    q: Tensor, k: Tensor, v: Tensor, piece: Piece, scale: float, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of one trimmed piece.

    Args:
        q: queries of the piece, [Tq, H, K]. k, v: its keys and values, [Tk, Hkv, K], [Tk, Hkv, V].

    Returns:
        out [Tq, H, V] and lse [Tq, H], both in at least float32.
    """
    dtype = torch.promote_types(torch.float32, q.dtype)
    key_heads, heads = k.shape[1], q.shape[1]
    out = q.new_empty(q.shape[0], heads, v.shape[2], dtype=dtype)
    lse = q.new_empty(q.shape[0], heads, dtype=dtype)
    keys, values = _by_head(k, key_heads, dtype), _by_head(v, key_heads, dtype)  # [Hkv, Tk, K], [Hkv, Tk, V]
    for rows, columns, own in _blocks(piece, window, heads, key_heads, dtype.itemsize):
        count = rows.stop - rows.start
        scores = torch.bmm(_by_head(q[rows], key_heads, dtype) * scale, keys[:, columns].mT)  # [Hkv, G * B, Tk]
        _hide(scores.unflatten(1, (-1, count)), own, piece.causal, window, float("-inf"))
        top = scores.amax(dim=-1, keepdim=True)
        total = scores.sub_(top).exp_().sum(dim=-1, keepdim=True)
        out[rows] = _by_token(torch.bmm(scores, values[:, columns]).div_(total), count)
        lse[rows] = _by_token(top.add_(total.log_()), count).squeeze(-1)
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    piece: Piece,
    scale: float,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one trimmed piece, given the final `out` and `lse` of its queries.

    Returns:
        dq [Tq, H, K], dk [Tk, Hkv, K], dv [Tk, Hkv, V] in at least float32.
    """
    dtype = torch.promote_types(torch.float32, q.dtype)
    key_heads, heads = k.shape[1], q.shape[1]
    dq = q.new_empty(q.shape, dtype=dtype)
    keys, values = _by_head(k, key_heads, dtype), _by_head(v, key_heads, dtype)
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    delta = (dout.to(dtype) * out.to(dtype)).sum(dim=-1, keepdim=True)  # [Tq, H, 1]
    for rows, columns, own in _blocks(piece, window, heads, key_heads, dtype.itemsize):
        count = rows.stop - rows.start
        queries = _by_head(q[rows], key_heads, dtype) * scale
        douts = _by_head(dout[rows], key_heads, dtype)
        probability = torch.bmm(queries, keys[:, columns].mT)  # [Hkv, G * B, Tk]
        _hide(probability.unflatten(1, (-1, count)), own, piece.causal, window, float("-inf"))
        probability.sub_(_by_head(lse[rows, :, None], key_heads, dtype)).exp_()
        dv[:, columns].baddbmm_(probability.mT, douts)
        dscores = torch.bmm(douts, values[:, columns].mT)
        dscores.sub_(_by_head(delta[rows], key_heads, dtype)).mul_(probability)
        dq[rows] = _by_token(torch.bmm(dscores, keys[:, columns]).mul_(scale), count)
        dk[:, columns].baddbmm_(dscores.mT, queries)
    return dq, dk.transpose(0, 1), dv.transpose(0, 1)
