"""What attention engines share: one autograd function, the incoming and the outgoing state, and the refusals.

An engine makes a `Call` for each attention; the call knows how to reach the other ranks. What crosses the wire in a
forward is kept on the recomputation tape as the output and the log-sum-exp, nothing else.

A state is replicated. Its keys and values on the way out are gathered here (`kv state forward`, the rows of the last
document, padded to the most any rank holds of them); their cotangent is whole on every rank, so each owner takes its own
rows' share and nothing is sent. The gradient of an incoming state is a sum over ranks (`kv state backward`).

Legend: T tokens held here, B tokens of the incoming state, P ranks, H heads, Hkv key heads, K, V widths.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longhaul.models.errors import UserError
from longhaul.models.ops import recompute
from longhaul.models.ops.attention import Mask
from longhaul.models.sequence import KVState
from longhaul.parallel.comm import Comm
from longhaul.parallel.shard import RankShard

from .pieces import Held, held_by

R = TypeVar("R")
Past = tuple[Tensor, Tensor] | None  # keys and values of the incoming state, [B, Hkv, K], [B, Hkv, V]


class Shape(NamedTuple):
    """Heads and widths of an attention."""

    heads: int
    key_heads: int
    key_width: int
    value_width: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> Shape:
        return cls(q.shape[1], k.shape[1], k.shape[2], v.shape[2])


class Gradients(NamedTuple):
    """Of q [T, H, K], k [T, Hkv, K] and v [T, Hkv, V], and this rank's share of the incoming state's [B, Hkv, K + V]."""

    q: Tensor
    k: Tensor
    v: Tensor
    past: Tensor | None


class Call(ABC):
    """One attention of one rank: forward once, backward once."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, past: Past) -> tuple[Tensor, Tensor]:
        """The output [T, H, V], and the log-sum-exp in whatever form the backward wants it. Not run in a recomputation."""

    def residuals(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        """What the backward needs; of a taped forward, only what a recomputation has too."""
        return q, k, v, out, lse

    @abstractmethod
    def backward(self, dout: Tensor, residuals: tuple[Tensor, ...], past: Past) -> Gradients: ...


class Engine(ABC):
    """A way for softmax attention to reach the other ranks.

    Args:
        comm: the sequence group.
    """

    name: str
    serves_windows = True

    def __init__(self, comm: Comm) -> None:
        self.comm = comm

    def check(self, mask: Mask) -> None:
        """Refuse, with a `UserError` that names the engines that can, what this one cannot serve.

        All engines serve every layout, any number of heads, packed documents and states.
        """
        if mask.window is not None and not self.serves_windows:
            others = ", ".join(sorted(engine.name for engine in Engine.__subclasses__() if engine.serves_windows))
            raise UserError(
                f"parallel.attention {self.name!r} computes the scores of all keys and does not serve the window of "
                f"{mask.window} tokens; use {others}."
            )

    @abstractmethod
    def call(self, shard: RankShard, shape: Shape, mask: Mask, scale: float, before: int, dtype: torch.dtype) -> Call:
        """An attention over the tokens of `shard`, and `before` tokens of an incoming state."""

    def attend(
        self, shard: RankShard, q: Tensor, k: Tensor, v: Tensor, mask: Mask, state: KVState | None, scale: float
    ) -> tuple[Tensor, KVState | None]:
        shape = Shape.of(q, k, v)
        self.check(mask)
        dtype = torch.promote_types(q.dtype, torch.promote_types(k.dtype, v.dtype))
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)  # keys and values are one message
        past: tuple[Tensor | None, Tensor | None] = (None, None)
        before = 0
        if state is not None and shard.documents.first_position:
            past, before = (state.k.to(dtype), state.v.to(dtype)), state.k.shape[0]
        call = self.call(shard, shape, mask, scale, before, dtype)
        end = _End(self.comm, shard, mask, before) if shard.keep_state else None
        out, k_end, v_end = _Attend.apply(call, end, self.comm, q, k, v, *past)
        return out, None if end is None else KVState(k_end, v_end)


def cached(shard: RankShard, key: tuple[object, ...], make: Callable[[], R]) -> R:
    """A table of this micro-batch's integers, made once for all layers."""
    return shard.segments.cached(("attention", *key), make)


def holdings(shard: RankShard) -> list[Held]:
    """What each rank holds."""
    ranks = range(shard.layout.num_ranks)
    return cached(shard, ("held",), lambda: [held_by(shard.layout, shard.documents, [rank]) for rank in ranks])


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """In what partial outputs and gradients are kept, and in what gradients travel while they are summed."""
    return torch.promote_types(torch.float32, dtype)


class _End:
    """The state after the stream: the last document's keys and values, from wherever they are held."""

    def __init__(self, comm: Comm, shard: RankShard, mask: Mask, before: int) -> None:
        documents = shard.documents
        single = documents.num_documents <= 1
        start = (-before if documents.first_position else 0) if single else documents.bounds[-2]
        if mask.window is not None:
            start = max(start, documents.num_tokens - (mask.window - 1))
        self.comm, self.start, self.before = comm, start, before
        layout = shard.layout
        self.rows: list[list[tuple[int, int, int]]] = []  # of each rank: (first row, last row + 1, token of the first)
        for own in layout.parts:
            row, kept = 0, []
            for a, b in own:
                first = max(a, start)
                if first < b:
                    kept.append((row + first - a, row + b - a, first))
                row += b - a
            self.rows.append(kept)
        self.most = max(sum(b - a for a, b, _ in kept) for kept in self.rows)

    def gather(self, k: Tensor, v: Tensor, past: Past) -> tuple[Tensor, Tensor]:
        """Keys and values of the outgoing state, [tokens, Hkv, K] and [tokens, Hkv, V]."""
        parts: list[Tensor] = []
        if past is not None and self.start < 0:
            parts.append(torch.cat(past, dim=2)[self.before + self.start :])
        both = torch.cat([k, v], dim=2)
        if self.most:
            payload = both.new_zeros(self.most, *both.shape[1:])
            own = self.rows[self.comm.rank]
            rows = torch.cat([both[:0], *(both[a:b] for a, b, _ in own)])
            payload[: rows.shape[0]] = rows
            gathered = self.comm.all_gather(payload, "kv state forward").wait()
            found: dict[int, Tensor] = {}
            for rank, kept in enumerate(self.rows):
                offset = 0
                for a, b, token in kept:
                    found[token] = gathered[rank, offset : offset + b - a]
                    offset += b - a
            parts += [found[token] for token in sorted(found)]
        whole = torch.cat([both[:0], *parts])
        keys, values = whole.split([k.shape[2], v.shape[2]], dim=2)
        return keys.contiguous(), values.contiguous()

    def own_rows(self, dend: Tensor, tokens: int) -> Tensor:
        """The cotangent of the outgoing state [tokens, ...] at this rank's rows, [T, ...]."""
        own = dend.new_zeros(tokens, *dend.shape[1:])
        for a, b, token in self.rows[self.comm.rank]:
            own[a:b] = dend[token - self.start :][: b - a]
        return own

    def past_rows(self, dend: Tensor) -> Tensor:
        """The same at the incoming state's rows, [B, ...]."""
        past = dend.new_zeros(self.before, *dend.shape[1:])
        if self.start < 0:
            past[self.before + self.start :] = dend[: -self.start]
        return past


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        end: _End | None,
        comm: Comm,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_past: Tensor | None,
        v_past: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        past = None if k_past is None or v_past is None else (k_past, v_past)

        def communicate() -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
            with torch.autocast(q.device.type, enabled=False):  # the dtype of q decides, not who calls
                out, lse = call.forward(q, k, v, past)
            state = None if end is None else end.gather(k, v, past)
            return out.to(q.dtype), lse, state

        out, lse, state = recompute.keep(communicate)
        ctx.call, ctx.end, ctx.comm, ctx.kv_dtype = call, end, comm, k.dtype
        ctx.widths = (k.shape[2], v.shape[2])
        residuals = call.residuals(q, k, v, out, lse)
        ctx.save_for_backward(k_past, v_past, *residuals)
        k_end, v_end = (None, None) if state is None else state
        return out, k_end, v_end

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout: Tensor, dk_end: Tensor | None, dv_end: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        k_past, v_past, *residuals = ctx.saved_tensors
        past = None if k_past is None else (k_past, v_past)
        with torch.autocast(dout.device.type, enabled=False):
            dq, dk, dv, dpast = ctx.call.backward(dout, tuple(residuals), past)
        dend = None
        if ctx.end is not None:
            assert dk_end is not None and dv_end is not None
            dend = torch.cat([dk_end, dv_end], dim=2).to(dk.dtype)
            own_k, own_v = ctx.end.own_rows(dend, dk.shape[0]).split(ctx.widths, dim=2)
            dk, dv = dk + own_k, dv + own_v
        dk_past = dv_past = None
        if past is not None and any(ctx.needs_input_grad[-2:]):
            assert dpast is not None, "queries of every rank may see the incoming state"
            whole = ctx.comm.all_reduce(dpast, "kv state backward").wait()
            if dend is not None:
                whole = whole + ctx.end.past_rows(dend)
            dk_past, dv_past = (part.to(ctx.kv_dtype) for part in whole.split(ctx.widths, dim=2))
        return None, None, None, dq.to(dout.dtype), dk.to(ctx.kv_dtype), dv.to(ctx.kv_dtype), dk_past, dv_past
