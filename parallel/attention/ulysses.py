"""Ulysses: attention over heads instead of tokens, by all-to-all.

Jacobs et al. (arXiv 2309.14509). Each rank gets all tokens for some of the heads, attends in one process, and gives the
outputs back. The published code wants the ranks to divide the heads; here heads are spread as evenly as they go, key heads are
replicated where their readers are spread, and a rank may have no head at all. Every layout: tokens are put in stream
order after the all-to-all.

Received by rank p, with n_s tokens on rank s, h_s query and g_s key heads (replicas counted), N tokens in all, e bytes
an element:

    heads forward     (N - n_p) (h_p K + g_p (K + V)) e   and of outputs   n_p (H - h_p) V e
    heads backward    (N - n_p) h_p V e                   and of gradients n_p ((H - h_p) K + (sum of g - g_p) (K + V)) e

Where all divides that is (2 H + 2 Hkv) n d (P - 1) / P elements each way (K = V = d). After activation checkpointing the
backward also brings queries, keys, values and outputs again, (N - n_p) (h_p (K + V) + g_p (K + V)) e: the tape keeps
outputs only.

Legend: T tokens held here, L tokens of all members, B tokens of the incoming state, P ranks, H heads, Hkv key heads, h, g
of them on this rank, K, V widths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longhaul.models.ops import recompute
from longhaul.models.ops.attention import Mask
from longhaul.parallel.comm import Comm
from longhaul.parallel.shard import RankShard

from .base import Call, Engine, Gradients, Past, Shape, accumulation, cached
from .heads import KEY, QUERY, HeadExchange, HeadSplit
from .pieces import Held, held_by
from .ring import RingCall, Route


class Ulysses(Engine):
    """Two all-to-alls each way; any number of heads, every layout and mask."""

    name = "ulysses"

    def call(self, shard: RankShard, shape: Shape, mask: Mask, scale: float, before: int, dtype: torch.dtype) -> Call:
        def make() -> tuple[Held, Route]:
            held = held_by(shard.layout, shard.documents, range(self.comm.size))
            return held, Route([held], mask)

        held, route = cached(shard, (self.name, mask), make)
        alone = Comm(None, self.comm.ledger)
        return HeadCall(self.comm, alone, held, route, shape, scale, before, dtype)


class HeadCall(Call):
    """Heads spread over the members of `comm`; among those who have the same heads, a ring (of one in Ulysses).

    Args:
        comm: who spreads the heads, and `ring`: who has the same heads of other tokens.
        held: what the members of `comm` hold together.
        route: of the ring.
    """

    def __init__(
        self,
        comm: Comm,
        ring: Comm,
        held: Held,
        route: Route,
        shape: Shape,
        scale: float,
        before: int,
        dtype: torch.dtype,
    ) -> None:
        self.split = HeadSplit(shape.heads, shape.key_heads, comm.size)
        self.exchange = HeadExchange(comm, held, self.split)
        self.queries, self.keys = self.split.ranges[QUERY][comm.rank], self.split.ranges[KEY][comm.rank]
        self.readers = self.split.readers(comm.rank)
        count, key_count = self.queries[1] - self.queries[0], self.keys[1] - self.keys[0]
        # Kernels want every key head to have as many readers; where it has not, each query head gets a copy of its own.
        self.copies = any(self.readers.count(key) != self.readers.count(0) for key in range(key_count))
        local = shape._replace(heads=count, key_heads=count if self.copies else key_count)
        # All members of the ring have the same heads, so without any none of them has messages.
        self.inner = RingCall(ring, route, local, scale, before, dtype) if count else None
        self.shape, self.dtype, self.before = shape, dtype, before
        self.scattered: tuple[Tensor, ...] | None = None
        self.has_heads_layout = False

    def _spread(self, x: Tensor) -> Tensor:
        """[.., g, W] to one key head a reader, if need be."""
        return x[:, self.readers] if self.copies else x

    def _past(self, past: Past) -> Past:
        if past is None:
            return None
        a, b = self.keys
        return self._spread(past[0][:, a:b]), self._spread(past[1][:, a:b])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, past: Past) -> tuple[Tensor, Tensor]:
        q, k, v = self.exchange.to_heads([q, k, v], [QUERY, KEY, KEY], "heads forward")
        if self.inner is None:
            out, lse = q.new_zeros(*q.shape[:2], v.shape[2]), q.new_zeros(q.shape[:2])
        else:
            out, lse = self.inner.forward(q, self._spread(k), self._spread(v), self._past(past))
        out = out.to(q.dtype)
        self.scattered = (q, k, v, out)
        return self.exchange.to_tokens([out], [QUERY], "heads forward")[0], lse

    def residuals(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        """In the heads' layout; a recomputation does not have that, so it has to be sent again."""
        scattered, self.scattered = self.scattered, None
        self.has_heads_layout = scattered is not None and not recompute.taped()
        return *(scattered if scattered is not None and self.has_heads_layout else (q, k, v, out)), lse

    def backward(self, dout: Tensor, residuals: tuple[Tensor, ...], past: Past) -> Gradients:
        q, k, v, out, lse = residuals
        dout = dout.to(q.dtype)
        if self.has_heads_layout:
            (dout,) = self.exchange.to_heads([dout], [QUERY], "heads backward")
        else:
            kinds = [QUERY, KEY, KEY, QUERY, QUERY]
            q, k, v, out, dout = self.exchange.to_heads([q, k, v, out, dout], kinds, "heads backward")
        wide = accumulation(q.dtype)
        dpast = None
        if past is not None:
            dpast = torch.zeros_like(torch.cat(past, dim=2), dtype=wide)
        if self.inner is None:
            grads = [torch.zeros_like(x) for x in (q, k, v)]
        else:
            saved = (q, self._spread(k), self._spread(v), out, lse)
            inner = self.inner.backward(dout, saved, self._past(past))
            grads = [x.to(q.dtype) for x in (inner.q, self._collect(inner.k), self._collect(inner.v))]
            if dpast is not None and inner.past is not None:
                dpast[:, self.keys[0] : self.keys[1]] = self._collect(inner.past)
        dq, dk, dv = self.exchange.to_tokens(grads, [QUERY, KEY, KEY], "heads backward")
        return Gradients(dq, dk, dv, dpast)

    def _collect(self, grad: Tensor) -> Tensor:
        """The adjoint of `_spread`."""
        if not self.copies:
            return grad
        index = torch.tensor(self.readers, device=grad.device)
        return grad.new_zeros(grad.shape[0], self.keys[1] - self.keys[0], grad.shape[2]).index_add(1, index, grad)
