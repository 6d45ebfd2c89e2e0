"""Causal depthwise convolution over packed documents, in plain torch.

Almost every token reads its own row and the W - 1 rows before it. All tokens are computed so, a cache-sized block at a
time, and then the few *edge* tokens are overwritten: those whose reach goes before their part (into the context) or
before their document (into nothing). Nothing is ever added and subtracted again, so one document cannot change a bit of
another. Saved for the backward: the inputs; what comes before the activation is computed anew.

Legend: T tokens, N parts, D channels, W taps, C tokens of a block, E edge tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from longhaul.models.ops.segments import Segments

CPU_BLOCK_BYTES = 512 << 10  # of one block of x: a few of them fit in a core's cache; measured best
DEVICE_BLOCK_BYTES = 256 << 20  # elsewhere a block is a kernel launch


class _Reach(NamedTuple):
    """Where tap `back` of the edge tokens reads; indices are distinct, so that adding there is deterministic."""

    edges_in_x: Tensor  # which edges read x, and where
    sources_in_x: Tensor
    edges_in_context: Tensor  # which edges read the flattened context [N * (W - 1), D], and where
    sources_in_context: Tensor


class _Edges(NamedTuple):
    tokens: Tensor  # [E], increasing
    host_tokens: list[int]
    reach: list[_Reach]  # W of them, `back` = 0 ... W - 1


def _make_edges(segments: Segments, taps: int, device: torch.device) -> _Edges:
    positions = segments.positions()
    starts = torch.tensor(segments.part_bounds[:-1], dtype=torch.int64)
    parts = torch.arange(segments.num_parts).repeat_interleave(torch.tensor(segments.part_lengths(), dtype=torch.int64))
    offsets = torch.arange(segments.num_tokens) - starts[parts]  # [T], inside the part
    tokens = (torch.minimum(positions, offsets) < taps - 1).nonzero().squeeze(1)
    reach = []
    for back in range(taps):
        inside = positions[tokens] >= back
        local = offsets[tokens] >= back
        in_x = (inside & local).nonzero().squeeze(1)
        in_context = (inside & ~local).nonzero().squeeze(1)
        early = tokens[in_context]
        sources = parts[early] * (taps - 1) + (taps - 1 + offsets[early] - back)
        tables = (in_x, tokens[in_x] - back, in_context, sources)
        reach.append(_Reach(*(table.to(device) for table in tables)))
    return _Edges(tokens.to(device), tokens.tolist(), reach)


def _edges(segments: Segments, taps: int, device: torch.device) -> _Edges:
    key = ("causal_conv", taps, str(device))
    return segments.cached(key, lambda: _make_edges(segments, taps, device))


def _block_length(x: Tensor, dtype: torch.dtype) -> int:
    budget = CPU_BLOCK_BYTES if x.device.type == "cpu" else DEVICE_BLOCK_BYTES
    return max(16, budget // (max(x.shape[1], 1) * dtype.itemsize))


def _convolve(rows: Tensor, lead: int, taps: Tensor, bias: Tensor | None) -> Tensor:
    """Rows [lead + C, D] -> [C, D] before the activation; `taps` [W, D], tap 0 reads the token itself."""
    own = rows[lead:]
    out = own * taps[0] if bias is None else torch.addcmul(bias, own, taps[0])
    for back in range(1, taps.shape[0]):
        missing = max(0, back - lead)  # only at the first tokens held here, which are edges
        if missing >= out.shape[0]:
            continue
        out[missing:].addcmul_(rows[lead + missing - back : rows.shape[0] - back], taps[back])
    return out


def _convolve_edges(x: Tensor, context: Tensor, taps: Tensor, bias: Tensor | None, edges: _Edges) -> Tensor:
    """Edge tokens before the activation, [E, D]; `context` is flattened, [N * (W - 1), D]."""
    out = torch.zeros(len(edges.host_tokens), x.shape[1], dtype=taps.dtype, device=x.device)
    if bias is not None:
        out += bias
    for tap, reach in zip(taps, edges.reach):
        out.index_add_(0, reach.edges_in_x, x[reach.sources_in_x] * tap)
        out.index_add_(0, reach.edges_in_context, context[reach.sources_in_context] * tap)
    return out


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        context: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        segments: Segments,
        silu: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, context, weight, bias)  # type: ignore[arg-type]
        ctx.call = segments, silu  # type: ignore[attr-defined]
        dtype = torch.promote_types(torch.float32, x.dtype)
        taps = weight.to(dtype).flip(1).T.contiguous()  # [W, D]
        offset = None if bias is None else bias.to(dtype)
        edges = _edges(segments, weight.shape[1], x.device)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        step = _block_length(x, dtype)
        for start in range(0, x.shape[0], step):
            stop, lead = min(start + step, x.shape[0]), min(start, weight.shape[1] - 1)
            before = _convolve(x[start - lead : stop].to(dtype), lead, taps, offset)
            y[start:stop] = torch.nn.functional.silu(before, inplace=True) if silu else before
        before = _convolve_edges(x, context.flatten(0, 1), taps, offset, edges)
        y[edges.tokens] = (torch.nn.functional.silu(before) if silu else before).to(y.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, context, weight, bias = ctx.saved_tensors  # type: ignore[attr-defined]
        segments, silu = ctx.call  # type: ignore[attr-defined]
        dtype = torch.promote_types(torch.float32, x.dtype)
        width = weight.shape[1]
        taps = weight.to(dtype).flip(1).T.contiguous()  # [W, D]
        offset = None if bias is None else bias.to(dtype)
        edges = _edges(segments, width, x.device)
        dx = torch.empty(x.shape, dtype=dtype, device=x.device)
        dtaps = torch.zeros_like(taps)
        dbias = torch.zeros_like(taps[0])
        step = _block_length(x, dtype)
        for start in range(0, x.shape[0], step):
            stop, lead = min(start + step, x.shape[0]), min(start, width - 1)
            rows = x[start - lead : stop].to(dtype)
            dbefore = _through_activation(dy[start:stop], rows, lead, taps, offset, silu)
            low, high = (bisect_left(edges.host_tokens, edge) for edge in (start, stop))
            if low < high:
                dbefore.index_fill_(0, edges.tokens[low:high] - start, 0)
            torch.mul(dbefore, taps[0], out=dx[start:stop])
            dtaps[0] += (dbefore * rows[lead:]).sum(dim=0)
            for back in range(1, width):
                missing = max(0, back - lead)
                if missing >= stop - start:
                    continue  # all of them are edge tokens
                reads = slice(start + missing - back, stop - back)
                dx[reads].addcmul_(dbefore[missing:], taps[back])
                dtaps[back] += (dbefore[missing:] * rows[lead + missing - back : rows.shape[0] - back]).sum(dim=0)
            if bias is not None:
                dbias += dbefore.sum(dim=0)
        flat = context.flatten(0, 1)
        dflat = torch.zeros(flat.shape, dtype=dtype, device=x.device)
        dbefore = dy[edges.tokens].to(dtype)
        if silu:
            dbefore = torch.ops.aten.silu_backward(dbefore, _convolve_edges(x, flat, taps, offset, edges))
        dbias += dbefore.sum(dim=0)
        for back, reach in enumerate(edges.reach):
            for values, dvalues, rows, sources in (
                (x, dx, reach.edges_in_x, reach.sources_in_x),
                (flat, dflat, reach.edges_in_context, reach.sources_in_context),
            ):
                dvalues.index_add_(0, sources, dbefore[rows] * taps[back])
                dtaps[back] += (dbefore[rows] * values[sources]).sum(dim=0)
        dweight = dtaps.T.flip(1).to(weight.dtype)
        dcontext = dflat.reshape(context.shape).to(context.dtype)
        return dx.to(x.dtype), dcontext, dweight, None if bias is None else dbias.to(bias.dtype), None, None


def _through_activation(dy: Tensor, rows: Tensor, lead: int, taps: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """The cotangent before the activation, [C, D], in a tensor of its own."""
    if not silu:
        return dy.to(taps.dtype, copy=True)
    return torch.ops.aten.silu_backward(dy.to(taps.dtype), _convolve(rows, lead, taps, bias))


def causal_conv(
    x: Tensor,
    context: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    segments: Segments,
    activation: str | None = None,
) -> Tensor:
    """Depthwise convolution that looks back inside each document, then an activation; in at least float32.

    Args:
        x: [T, D].
        context: the W - 1 tokens before each part, [N, W - 1, D], oldest first; rows before a document's start are
            never read.
        weight: [D, W]; `weight[:, W - 1 - j]` multiplies the token `j` back (as in `torch.nn.Conv1d`).
        bias: [D] or None.
        segments: who owns which tokens.
        activation: "silu" or None.

    Returns:
        y [T, D], in the dtype of x.
    """
    if activation not in (None, "silu"):
        raise ValueError(f"The activation of a convolution is 'silu' or None, but is {activation!r}.")
    expected = segments.num_parts, weight.shape[1] - 1, x.shape[1]
    if tuple(context.shape) != expected:
        raise ValueError(
            f"The context must be [parts, taps - 1, channels] = {expected}, but is {tuple(context.shape)}."
        )
    return _CausalConv.apply(x, context, weight, bias, segments, activation == "silu")
