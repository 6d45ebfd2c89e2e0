"""Attention over packed documents, one work item ("piece") at a time, and the one place that chooses a kernel.

Every engine is made of these calls. Partials are in at least float32; `merge` joins partials of the same queries over
different keys, and the backward takes the *final* out and lse, so a gradient may be computed block by block too.

Legend: Tq queries, Tk keys, H heads, Hkv key heads (divides H), K key width, V value width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from longhaul.models.ops import recompute

from . import chunk, flash
from .mask import Piece, binding_window, simple_blocks, trim


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Join partials of the same queries over disjoint keys.

    Args:
        out_a, out_b: [Tq, H, V]. lse_a, lse_b: [Tq, H]; `-inf` says that no key was seen (and out is zero).

    Returns:
        out and lse over all keys, in at least float32.
    """
    dtype = torch.promote_types(torch.float32, torch.promote_types(out_a.dtype, out_b.dtype))
    # A sigmoid of the difference never overflows. Two blind sides would give nan: b then weighs nothing.
    share = torch.sigmoid((lse_b - lse_a).masked_fill(lse_b == -math.inf, -math.inf)).to(dtype)
    return torch.lerp(out_a.to(dtype), out_b.to(dtype), share[..., None]), torch.logaddexp(lse_a, lse_b)


class _Job(NamedTuple):
    """One kernel call: pieces that tile a run of queries and a run of keys."""

    kernel: str
    run: list[Piece]
    window: int | None = None
    limits: tuple[int, int] = (-1, -1)

    @property
    def queries(self) -> slice:
        return slice(self.run[0].q_start, self.run[-1].q_stop)

    @property
    def keys(self) -> slice:
        return slice(self.run[0].k_start, self.run[-1].k_stop)


def _plan(q: Tensor, v: Tensor, pieces: Sequence[Piece], window: int | None) -> list[_Job]:
    """Choose kernels. All of them mean the same; they differ in what they accept and how fast they are."""
    jobs: list[_Job] = []
    packs, fused = flash.varlen_fits(q, v), flash.cpu_fits(q, v)
    for untrimmed in pieces:
        piece = trim(untrimmed, window)
        if piece is None:
            continue
        hides = binding_window(piece, window)
        if packs and (limits := _pack_limits(piece, untrimmed.causal, window)) is not None:
            if jobs and _continues(jobs[-1], piece, limits):
                jobs[-1].run.append(piece)
            else:
                jobs.append(_Job("flash_attn", [piece], limits=limits))
        elif fused and hides is None:
            jobs.extend(_Job("cpu", [block]) for block in simple_blocks(piece))
        else:
            jobs.append(_Job("chunk", [piece], hides))
    return jobs


def _pack_limits(piece: Piece, causal: bool, window: int | None) -> tuple[int, int] | None:
    """flash-attn's window of a trimmed piece; `causal` is what it was before it was trimmed."""
    if causal and piece.gap == 0:
        piece = piece._replace(causal=True)  # hides nothing that matters, and need not end a run of causal pieces
    return flash.varlen_window(piece, window)


def _continues(job: _Job, piece: Piece, limits: tuple[int, int]) -> bool:
    tiles = job.queries.stop == piece.q_start and job.keys.stop == piece.k_start
    return job.kernel == "flash_attn" and job.limits == limits and tiles


def _forward(job: _Job, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    # The dtype of q decides: autocast would lower the matmuls of the plain kernel behind our back.
    with torch.autocast(q.device.type, enabled=False):
        return _run_forward(job, q, k, v, scale)


def _run_forward(job: _Job, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = q[job.queries], k[job.keys], v[job.keys]
    if job.kernel == "cpu":
        return flash.cpu_forward(q, k, v, job.run[0].causal, scale)
    if job.kernel == "flash_attn":
        module = flash.flash_attn_module()
        assert module is not None
        return flash.varlen_forward(module, q, k, v, job.run, job.limits, scale)
    return chunk.forward(q, k, v, job.run[0], scale, job.window)


def _backward(
    job: _Job, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        return _run_backward(job, dout, q, k, v, out, lse, scale)


def _run_backward(
    job: _Job, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v = dout[job.queries], q[job.queries], k[job.keys], v[job.keys]
    out, lse = out[job.queries], lse[job.queries]
    if job.kernel == "cpu":
        return flash.cpu_backward(dout, q, k, v, out, lse, job.run[0].causal, scale)
    if job.kernel == "flash_attn":
        module = flash.flash_attn_module()
        assert module is not None
        return flash.varlen_backward(module, dout, q, k, v, out, lse, job.run, job.limits, scale)
    return chunk.backward(dout, q, k, v, out, lse, job.run[0], scale, job.window)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2] or q.shape[1] % max(k.shape[1], 1):
        raise ValueError(
            f"Attention wants q [Tq, H, K], k [Tk, Hkv, K], v [Tk, Hkv, V] with H a multiple of Hkv, "
            f"but got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}."
        )


def attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], scale: float, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of the queries of each piece over its keys. Pieces that share queries are merged.

    Args:
        q: [Tq, H, K]. k: [Tk, Hkv, K]. v: [Tk, Hkv, V].
        pieces: the work, with disjoint keys for any one query.
        scale: factor of the scores.
        window: keys lie at most `window - 1` tokens back.

    Returns:
        out [Tq, H, V] and lse [Tq, H], in at least float32; zero and `-inf` for a query that sees no key.
    """
    _check(q, k, v)
    dtype = torch.promote_types(torch.float32, q.dtype)
    jobs = _plan(q, v, pieces, window)
    if len(jobs) == 1 and jobs[0].queries == slice(0, q.shape[0]):
        out, lse = _forward(jobs[0], q, k, v, scale)
        return out.to(dtype), lse
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2], dtype=dtype)
    lse = q.new_full(q.shape[:2], -math.inf, dtype=dtype)
    written = 0
    for job in jobs:
        part_out, part_lse = _forward(job, q, k, v, scale)
        rows = job.queries
        if rows.start < written:
            part_out, part_lse = merge(out[rows], lse[rows], part_out, part_lse)
        out[rows], lse[rows] = part_out, part_lse
        written = max(written, rows.stop)
    return out, lse


def attend_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pieces: Sequence[Piece],
    scale: float,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend_varlen`.

    Args:
        dout: cotangent of out, [Tq, H, V].
        out, lse: the final ones of each query, over *all* its keys, whichever pieces are given here.

    Returns:
        dq [Tq, H, K], dk [Tk, Hkv, K], dv [Tk, Hkv, V] of these pieces, in at least float32.
    """
    dtype = torch.promote_types(torch.float32, q.dtype)
    jobs = _plan(q, v, pieces, window)
    if len(jobs) == 1 and (jobs[0].queries, jobs[0].keys) == (slice(0, q.shape[0]), slice(0, k.shape[0])):
        dq, dk, dv = (grad.to(dtype) for grad in _backward(jobs[0], dout, q, k, v, out, lse, scale))
        return dq, dk, dv
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    for job in jobs:
        part_q, part_k, part_v = _backward(job, dout, q, k, v, out, lse, scale)
        dq[job.queries] += part_q
        dk[job.keys] += part_k
        dv[job.keys] += part_v
    return dq, dk, dv


def attend_block(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None = None, gap: int = 0
) -> tuple[Tensor, Tensor]:
    """One block of queries over one block of keys; see `Piece` for `causal` and `gap`, `attend_varlen` for the rest."""
    return attend_varlen(q, k, v, [Piece(0, q.shape[0], 0, k.shape[0], causal, gap)], scale, window)


def attend_block_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    window: int | None = None,
    gap: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block, given the final out and lse of its queries; see `attend_varlen_backward`."""
    piece = Piece(0, q.shape[0], 0, k.shape[0], causal, gap)
    return attend_varlen_backward(dout, q, k, v, out, lse, [piece], scale, window)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pieces: Sequence[Piece],
        scale: float,
        window: int | None,
    ) -> tuple[Tensor, Tensor]:
        def compute() -> tuple[Tensor, Tensor]:
            out, lse = attend_varlen(q, k, v, pieces, scale, window)
            return out.to(q.dtype), lse

        out, lse = recompute.dear(compute)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = pieces, scale, window  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors  # type: ignore[attr-defined]
        grads = attend_varlen_backward(dout, q, k, v, out, lse, *ctx.call)  # type: ignore[attr-defined]
        return *(grad.to(x.dtype) for grad, x in zip(grads, (q, k, v))), None, None, None


def attention(
    q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], scale: float, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Differentiable attention in one process: out [Tq, H, V] in the dtype of q, lse [Tq, H] (no gradient).

    Arguments are those of `attend_varlen`.
    """
    return _Attention.apply(q, k, v, list(pieces), scale, window)
