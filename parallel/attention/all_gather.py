"""LASP-2H: softmax attention by an all-gather of keys and values.

Sun et al. (arXiv 2502.07563), section 3.4, and the context parallelism of Llama 3. Keys and values travel in one message
a slice of key heads; attention to a rank's own keys runs while the first does, and a slice's while the next travels, so
no more than two gathered slices are held. The backward gathers them again (cheaper than holding them for every layer) and
sums their gradients by one reduce-scatter a slice. The gathered rows are put in stream order, so every layout is the same.

Received per rank and layer, with n the most tokens any rank holds, whatever the number of slices: forward
`(P - 1) n Hkv (K + V)` elements of the input dtype, backward the same again plus `(P - 1) n Hkv (K + V)` of the accumulation
dtype. Nothing where no document crosses ranks.

Legend: T tokens held here, L tokens of the stream, B tokens of the incoming state, P ranks, H heads, Hkv key heads, h key
heads of a slice, K, V widths.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from longhaul.models.errors import UserError
from longhaul.models.ops.attention import Mask, Piece, attend_varlen, attend_varlen_backward, merge
from longhaul.parallel.comm import Comm, Handle
from longhaul.parallel.exchange.base import crosses
from longhaul.parallel.layout import even_cut
from longhaul.parallel.shard import RankShard

from .base import Call, Engine, Gradients, Past, Shape, cached, holdings
from .pieces import Held, Run, held_by, past_runs, visible


class AllGatherAttention(Engine):
    """One all-gather of K and V each way and one reduce-scatter of their gradients, a slice of heads.

    Args:
        head_slices: slices into which the key heads are cut (as many as there are heads at most): memory for gathered keys
            and values shrinks by it, messages grow by it.
    """

    name = "all_gather"

    def __init__(self, comm: Comm, head_slices: int = 1) -> None:
        super().__init__(comm)
        if head_slices < 1:
            raise UserError(f"Attention 'all_gather' cuts the key heads into at least 1 slice, not {head_slices}.")
        self.head_slices = head_slices

    def call(self, shard: RankShard, shape: Shape, mask: Mask, scale: float, before: int, dtype: torch.dtype) -> Call:
        work = cached(shard, (self.name, mask, before), lambda: _work(self.comm, shard, mask, before))
        slices = even_cut(0, shape.key_heads, min(self.head_slices, shape.key_heads))
        return _Call(self.comm, work, slices, shape, mask.window, scale)


class _Work(NamedTuple):
    """Whose rows are where, and the pieces of this rank.

    Attributes:
        needed: some document crosses ranks.
        most: the most tokens any rank holds.
        stream: all tokens, in order.
        own, past, others: against keys held here, of the incoming state, and of the stream.
    """

    needed: bool
    most: int
    stream: Held
    own: list[Piece]
    past: list[Piece]
    others: list[Piece]


def _work(comm: Comm, shard: RankShard, mask: Mask, before: int) -> _Work:
    stream = held_by(shard.layout, shard.documents, range(comm.size))
    mine = holdings(shard)[comm.rank].runs
    # A run sees its own keys here; every other key of the stream, its own rank's too, comes with the gather.
    own, others = [], []
    for run in mine:
        own += visible([run], [run], mask)
        others += visible([run], _without(stream.runs, run), mask)
    needed = crosses(shard.chain)
    return _Work(needed, shard.layout.max_tokens(), stream, own, visible(mine, past_runs(before), mask), others)


def _without(stream: list[Run], run: Run) -> list[Run]:
    """The stream's runs of the document of `run`, less its own tokens."""
    whole = next(other for other in stream if other.document == run.document)
    first = whole.start + run.first - whole.first
    last = first + run.stop - run.start
    around = [whole._replace(stop=first), whole._replace(start=last, first=run.last + 1)]
    return [part for part in around if part.stop > part.start]


class _Call(Call):
    def __init__(
        self, comm: Comm, work: _Work, slices: list[tuple[int, int]], shape: Shape, window: int | None, scale: float
    ) -> None:
        self.comm, self.work, self.shape, self.window, self.scale = comm, work, shape, window, scale
        self.slices = slices if work.needed else []
        self.group = shape.heads // shape.key_heads
        self.widths = [shape.key_width, shape.value_width]

    def _start(self, k: Tensor, v: Tensor, index: int, label: str) -> Handle | None:
        """Post a slice of K and V as one message, padded to the most tokens any rank holds."""
        if index >= len(self.slices):
            return None
        a, b = self.slices[index]
        payload = k.new_zeros(self.work.most, b - a, sum(self.widths))
        payload[: k.shape[0]] = torch.cat([k[:, a:b], v[:, a:b]], dim=2)
        return self.comm.all_gather(payload, label)

    def _slices(self, handle: Handle | None, k: Tensor, v: Tensor, label: str) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """(first and last key head, keys [L, h, K], values [L, h, V]) of each slice; the next one is under way."""
        for index, (a, b) in enumerate(self.slices):
            assert handle is not None, "a slice is posted before the one ahead of it is worked on"
            gathered = handle.wait()  # [P, n, h, K + V]
            handle = self._start(k, v, index + 1, label)
            stream = torch.cat([gathered[rank, start:stop] for rank, start, stop in self.work.stream.sources])
            keys, values = stream.split(self.widths, dim=2)
            yield a, b, keys, values

    def forward(self, q: Tensor, k: Tensor, v: Tensor, past: Past) -> tuple[Tensor, Tensor]:
        handle = self._start(k, v, 0, "kv forward")
        self.comm.ledger.mark("local start")
        out, lse = attend_varlen(q, k, v, self.work.own, self.scale, self.window)
        if past is not None:
            out, lse = merge(out, lse, *attend_varlen(q, *past, self.work.past, self.scale, self.window))
        self.comm.ledger.mark("local end")
        for a, b, keys, values in self._slices(handle, k, v, "kv forward"):
            heads = slice(a * self.group, b * self.group)
            if self.work.others:
                part = attend_varlen(q[:, heads], keys, values, self.work.others, self.scale, self.window)
                out[:, heads], lse[:, heads] = merge(out[:, heads], lse[:, heads], *part)
        return out, lse

    def backward(self, dout: Tensor, residuals: tuple[Tensor, ...], past: Past) -> Gradients:
        q, k, v, out, lse = residuals
        handle = self._start(k, v, 0, "kv backward")
        self.comm.ledger.mark("local start")
        dq, dk, dv = attend_varlen_backward(dout, q, k, v, out, lse, self.work.own, self.scale, self.window)
        dpast = None
        if past is not None:
            more = attend_varlen_backward(dout, q, *past, out, lse, self.work.past, self.scale, self.window)
            dq, dpast = dq + more[0], torch.cat(more[1:], dim=2)
        self.comm.ledger.mark("local end")
        summing: list[tuple[int, int, Handle]] = []
        for a, b, keys, values in self._slices(handle, k, v, "kv backward"):
            heads = slice(a * self.group, b * self.group)
            queries = (dout[:, heads], q[:, heads], keys, values, out[:, heads], lse[:, heads])
            part = attend_varlen_backward(*queries, self.work.others, self.scale, self.window)
            dq[:, heads] += part[0]
            summing.append((a, b, self._scatter(torch.cat(part[1:], dim=2))))
        for a, b, pending in summing:
            more_k, more_v = pending.wait()[: k.shape[0]].split(self.widths, dim=2)
            dk[:, a:b] += more_k
            dv[:, a:b] += more_v
        return Gradients(dq, dk, dv, dpast)

    def _scatter(self, dkv: Tensor) -> Handle:
        """Sum every rank's gradients of the stream's keys, [L, h, K + V], and keep this rank's, [n, h, K + V]."""
        blocks = dkv.new_zeros(self.comm.size, self.work.most, *dkv.shape[1:])
        token = 0
        for rank, start, stop in self.work.stream.sources:
            blocks[rank, start:stop] = dkv[token : token + stop - start]
            token += stop - start
        return self.comm.reduce_scatter(blocks, "kv backward")
