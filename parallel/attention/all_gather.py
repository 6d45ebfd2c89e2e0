"""LASP-2H: softmax attention by one all-gather of keys and values.

Sun et al. (arXiv 2502.07563), section 3.4, and the context parallelism of Llama 3. Keys and values travel in one message;
attention to a rank's own keys runs while they do. The backward gathers them again (cheaper than holding them for every
layer) and sums their gradients by one reduce-scatter.

Received per rank and layer, with n the most tokens any rank holds: forward `(P - 1) n Hkv (K + V)` elements of the input
dtype, backward the same again plus `(P - 1) n Hkv (K + V)` of the accumulation dtype.

Legend: T tokens held here, L tokens of the stream, B tokens of the incoming state, P ranks, H heads, Hkv key heads, K, V widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longhaul.models.ops import recompute
from longhaul.models.ops.attention import (
    Mask,
    Piece,
    attend_varlen,
    attend_varlen_backward,
    merge,
)
from longhaul.models.sequence import KVState
from longhaul.parallel.comm import Comm, Handle
from longhaul.parallel.exchange.base import crosses
from longhaul.parallel.shard import RankShard


class AllGatherAttention:
    """One all-gather of K and V each way, and one reduce-scatter of their gradients."""

    name = "all_gather"

    def __init__(self, comm: Comm) -> None:
        self.comm = comm

    def attend(
        self, shard: RankShard, q: Tensor, k: Tensor, v: Tensor, mask: Mask, state: KVState | None, scale: float
    ) -> tuple[Tensor, KVState | None]:
        before = 0 if state is None or not shard.documents.first_position else state.k.shape[0]
        plan = _Plan(self.comm, shard, mask, scale, before)
        past = (None, None) if state is None or not before else (state.k, state.v)
        out, k_end, v_end = _Attend.apply(plan, q, k, v, *past)
        return out, KVState(k_end, v_end) if shard.keep_state else None


class _Work(NamedTuple):
    """Queries against keys held here, and against keys before (and after) them in [state | stream]."""

    own: list[Piece]
    remote: list[Piece]


class _Plan:
    def __init__(self, comm: Comm, shard: RankShard, mask: Mask, scale: float, before: int) -> None:
        self.comm, self.shard, self.mask, self.scale, self.before = comm, shard, mask, scale, before
        self.most = shard.layout.max_tokens()
        self.needed = crosses(shard.chain) or shard.keep_state or before > 0

    def work(self) -> _Work:
        """The pieces of this rank; keys of `remote` count from the start of [state | stream]."""
        segments, documents = self.shard.segments, self.shard.documents
        own, remote = [], []
        for s in range(segments.num_segments):
            start, stop = segments.bounds[s], segments.bounds[s + 1]
            part, document = segments.part_of[s], segments.document_of[s]
            own.append(Piece(start, stop, start, stop, self.mask.causal))
            first = self.before + segments.part_starts[part] + start - segments.part_bounds[part]
            opens = 0 if document == 0 else self.before + documents.bounds[document]
            # A gap of its own length puts the first query right after the last of the earlier keys.
            if opens < first:
                remote.append(Piece(start, stop, opens, first, False, gap=stop - start))
            last, closes = first + stop - start, self.before + documents.bounds[document + 1]
            if not self.mask.causal and last < closes:
                remote.append(Piece(start, stop, last, closes, False, gap=last - closes))
        return _Work(own, remote)

    def start_gather(self, k: Tensor, v: Tensor, label: str) -> Handle | None:
        """Post K and V as one message, padded to the most tokens any rank holds."""
        if not self.needed:
            return None
        width = k.shape[2] + v.shape[2]
        payload = k.new_zeros(self.most, k.shape[1], width)
        torch.cat([k, v], dim=2, out=payload[: k.shape[0]])
        return self.comm.all_gather(payload, label)

    def finish_gather(self, handle: Handle | None, past: Sequence[Tensor | None], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of [state | stream], [B + L, Hkv, K] and [B + L, Hkv, V]."""
        if handle is None:
            return k.new_zeros(0, *k.shape[1:]), v.new_zeros(0, *v.shape[1:])
        gathered = handle.wait()  # [P, n, Hkv, K + V]
        stream = torch.cat([gathered[rank, a:b] for rank, a, b in self.pieces_in_order()])
        keys, values = stream.split([k.shape[2], v.shape[2]], dim=2)
        if past[0] is None or past[1] is None:
            return keys, values
        return torch.cat([past[0], keys]), torch.cat([past[1], values])

    def pieces_in_order(self) -> list[tuple[int, int, int]]:
        """(rank, start, stop) of each part among its rank's tokens, in stream order."""
        offsets, result = {}, []
        for rank, ranges in enumerate(self.shard.layout.parts):
            offset = 0
            for slot, (start, stop) in enumerate(ranges):
                offsets[rank, slot] = (offset, offset + stop - start)
                offset += stop - start
        for rank, slot in self.shard.layout.order:
            result.append((rank, *offsets[rank, slot]))
        return result

    def state_range(self) -> slice:
        """Which of [state | stream] a continuation of the last document needs."""
        documents = self.shard.documents
        total = self.before + documents.num_tokens
        start = self.before + documents.bounds[-2] if documents.num_documents > 1 else 0
        if documents.num_documents == 1 and not documents.first_position:
            start = self.before
        if self.mask.window is not None:
            start = max(start, total - (self.mask.window - 1))
        return slice(start, total)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: _Plan, q: Tensor, k: Tensor, v: Tensor, k_past: Tensor | None, v_past: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        out, lse, k_end, v_end = recompute.keep(lambda: _forward(plan, q, k, v, (k_past, v_past)))
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, k_past, v_past, out, lse)
        return out, k_end, v_end

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout: Tensor, dk_end: Tensor | None, dv_end: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        q, k, v, k_past, v_past, out, lse = ctx.saved_tensors
        handle = plan.start_gather(k, v, "kv backward")
        work = plan.work()
        plan.comm.ledger.mark("local start")
        dq, dk, dv = attend_varlen_backward(dout, q, k, v, out, lse, work.own, plan.scale, plan.mask.window)
        plan.comm.ledger.mark("local end")
        dk_past = dv_past = None
        if handle is not None:
            keys, values = plan.finish_gather(handle, (k_past, v_past), k, v)
            remote = attend_varlen_backward(
                dout, q, keys, values, out, lse, work.remote, plan.scale, plan.mask.window
            )
            dq = dq + remote[0]
            dkv = torch.cat(remote[1:], dim=2)  # [B + L, Hkv, K + V]
            own = _scatter(plan, dkv[plan.before :])
            ends = plan.shard.keep_state and dk_end is not None and dv_end is not None
            end = torch.zeros_like(dkv)
            if ends:
                assert dk_end is not None and dv_end is not None
                end[plan.state_range()] = torch.cat([dk_end, dv_end], dim=2).to(end.dtype)
            # A state's cotangent is whole on every rank: each owner takes its own tokens' share once.
            own = own + _local(plan, end[plan.before :])
            dk, dv = dk + own[..., : k.shape[2]], dv + own[..., k.shape[2] :]
            if plan.before:
                past = plan.comm.all_reduce(dkv[: plan.before], "kv state backward").wait() + end[: plan.before]
                dk_past, dv_past = past.split([k.shape[2], v.shape[2]], dim=2)
                dk_past, dv_past = dk_past.to(k.dtype), dv_past.to(v.dtype)
        return None, dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dk_past, dv_past


def _forward(
    plan: _Plan, q: Tensor, k: Tensor, v: Tensor, past: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    handle = plan.start_gather(k, v, "kv forward")
    work = plan.work()
    plan.comm.ledger.mark("local start")
    out, lse = attend_varlen(q, k, v, work.own, plan.scale, plan.mask.window)
    plan.comm.ledger.mark("local end")
    if handle is None:
        return out.to(q.dtype), lse, None, None
    keys, values = plan.finish_gather(handle, past, k, v)
    if work.remote:
        earlier = attend_varlen(q, keys, values, work.remote, plan.scale, plan.mask.window)
        out, lse = merge(out, lse, *earlier)
    if not plan.shard.keep_state:
        return out.to(q.dtype), lse, None, None
    kept = plan.state_range()
    return out.to(q.dtype), lse, keys[kept].clone(), values[kept].clone()


def _scatter(plan: _Plan, dkv: Tensor) -> Tensor:
    """Sum every rank's gradients of the stream's keys, [L, ...], and keep this rank's, [T, ...]."""
    blocks = dkv.new_zeros(plan.comm.size, plan.most, *dkv.shape[1:])
    token = 0
    for rank, start, stop in plan.pieces_in_order():
        blocks[rank, start:stop] = dkv[token : token + stop - start]
        token += stop - start
    return plan.comm.reduce_scatter(blocks, "kv backward").wait()[: plan.shard.num_tokens]


def _local(plan: _Plan, stream: Tensor) -> Tensor:
    """This rank's rows of [L, ...], [T, ...]."""
    return torch.cat([stream[start:stop] for start, stop in plan.shard.layout.parts[plan.comm.rank]])
