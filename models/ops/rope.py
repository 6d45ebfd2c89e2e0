"""Rotary position embedding, on positions inside each document.

Half-split convention (Llama): channel `i` of a head is paired with channel `i + K / 2`, and the pair turns by
`position * base ** (-2 i / K)`.

Legend: T tokens, H heads, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .segments import Segments


def rope_table(positions: Tensor, width: int, base: float = 10000.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Cosines and sines of every token's angles, for all layers of a model that share a base.

    Angles are computed in float64: at position 10^7, float32 would be off by half a radian.

    Args:
        positions: int64 [T], any size. width: K, even.
        dtype: of the result; float32 or wider.

    Returns:
        [2, T, K / 2]: cosines, sines.
    """
    if width % 2:
        raise ValueError(f"Rotary embedding pairs channels, so the head width must be even, but is {width}.")
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
    angles = positions.to(torch.float64)[:, None] * base**-exponents  # [T, K / 2]
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [T, H, K] by angles given as cos, sin [T, K / 2], in the dtype of these."""
    cos, sin = cos[:, None], sin[:, None]  # [T, 1, K / 2]
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=cos.dtype, device=x.device)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out.to(x.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        return _turn(x, table[0], table[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return _turn(dy, table[0], -table[1]), None


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn x [T, H, K] by a `rope_table` [2, T, K / 2] (no gradient); only the table is kept for the backward."""
    return _Rotate.apply(x, table)


def rope(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary embedding of x [T, H, K] at positions [T], computed in at least float32, in the dtype of x."""
    dtype = torch.promote_types(torch.float32, x.dtype)
    return rotate(x, rope_table(positions, x.shape[-1], base, dtype))


def rope_in_documents(x: Tensor, segments: Segments, base: float = 10000.0) -> Tensor:
    """Rotary embedding of x [T, H, K] at each token's position in its document.

    The table is made once for all layers that share a width and a base: its float64 angles cost more than turning.
    """
    dtype = torch.promote_types(torch.float32, x.dtype)
    key = ("rope", x.shape[-1], base, dtype, str(x.device))
    table = segments.cached(key, lambda: rope_table(segments.positions(x.device), x.shape[-1], base, dtype))
    return rotate(x, table)
