"""Fused kernels behind one shape of call: queries and keys of a run of pieces in, out and lse out.

`cpu_*` is torch's own CPU kernel; it aligns a causal mask at the top left, so it gets squares and full rectangles only.
`varlen_*` is the flash-attn package (CUDA): many pieces a call, causal masks aligned at the bottom right.

Legend: Tq queries, Tk keys, H heads, Hkv key heads, K key width, V value width, S pieces.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .mask import Piece

_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # float64 takes the plain twin, whose rounding is better


def cpu_fits(q: Tensor, v: Tensor) -> bool:
    return q.device.type == "cpu" and q.dtype in _CPU_DTYPES and q.shape[-1] == v.shape[-1]


def _heads_first(x: Tensor) -> Tensor:
    """[T, H, ...] -> [1, H, T, ...], a view."""
    return x.transpose(0, 1)[None]


def cpu_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """One square (causal) or full rectangle: out [Tq, H, V], lse [Tq, H]."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _heads_first(q), _heads_first(k), _heads_first(v), 0.0, causal, scale=scale
    )
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients dq [Tq, H, K], dk [Tk, Hkv, K], dv [Tk, Hkv, V] in the dtype of q."""
    dout, out = dout.to(q.dtype), out.to(q.dtype)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(_heads_first(x) for x in (dout, q, k, v, out, lse)), 0.0, causal, scale=scale
    )
    dq, dk, dv = (grad[0].transpose(0, 1) for grad in grads)
    return dq, dk, dv


@functools.cache
def flash_attn_module() -> ModuleType | None:
    """flash-attn's interface, where it is installed."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    return importlib.import_module("flash_attn.flash_attn_interface")


def varlen_fits(q: Tensor, v: Tensor) -> bool:
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] == v.shape[-1] <= 256
        and flash_attn_module() is not None
    )


def varlen_window(piece: Piece, window: int | None) -> tuple[int, int] | None:
    """(left, right) limits as flash-attn counts them, from the bottom-right diagonal; None if it cannot say this."""
    if piece.causal and piece.gap != 0:
        return None
    right = 0 if piece.causal else -1
    if window is None:
        return -1, right
    left = window - 1 - piece.gap
    return (left, right) if left >= 0 else None


def _varlen_arguments(run: Sequence[Piece], device: torch.device) -> dict[str, object]:
    queries = [piece.q_start - run[0].q_start for piece in run] + [run[-1].q_stop - run[0].q_start]
    keys = [piece.k_start - run[0].k_start for piece in run] + [run[-1].k_stop - run[0].k_start]
    return {
        "cu_seqlens_q": torch.tensor(queries, dtype=torch.int32, device=device),
        "cu_seqlens_k": torch.tensor(keys, dtype=torch.int32, device=device),
        "max_seqlen_q": max(b - a for a, b in zip(queries, queries[1:])),
        "max_seqlen_k": max(b - a for a, b in zip(keys, keys[1:])),
        "dropout_p": 0.0,
    }


def varlen_forward(
    module: ModuleType, q: Tensor, k: Tensor, v: Tensor, run: Sequence[Piece], limits: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor]:
    """A run of pieces that tile q and k: out [Tq, H, V], lse [Tq, H]."""
    out, lse, *_ = module._flash_attn_varlen_forward(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        **_varlen_arguments(run, q.device),
        softmax_scale=scale,
        causal=limits[1] == 0,
        window_size_left=limits[0],
        window_size_right=limits[1],
    )
    return out, lse.transpose(0, 1)  # the package keeps lse as [H, Tq]


def varlen_backward(
    module: ModuleType,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    run: Sequence[Piece],
    limits: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients dq [Tq, H, K], dk [Tk, Hkv, K], dv [Tk, Hkv, V] in the dtype of q."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    module._flash_attn_varlen_backward(
        dout.to(q.dtype).contiguous(),
        q,
        k,
        v,
        out.to(q.dtype).contiguous(),
        lse.transpose(0, 1).contiguous(),
        dq,
        dk,
        dv,
        **_varlen_arguments(run, q.device),
        softmax_scale=scale,
        causal=limits[1] == 0,
        window_size_left=limits[0],
        window_size_right=limits[1],
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
    )
    return dq, dk, dv
