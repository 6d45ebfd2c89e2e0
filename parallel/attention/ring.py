"""Ring attention: keys and values go from rank to rank, softmax is merged block by block.

Liu et al. (arXiv 2310.01889), for every layout: contiguous, zigzag (zhuzilin/ring-flash-attention), striped (Brandon et
al., arXiv 2311.09431) and the per-document ones are one loop over runs of tokens. Partial outputs and log-sum-exps are kept in
at least float32 and merged by a sigmoid of differences; the published kernels round them at each hop.

The backward moves what is fewer bytes for the layer's heads: keys, values and their gradients, or (BurstAttention, Sun
et al., arXiv 2403.09347) queries, output cotangents, two numbers a head and the queries' gradients.

A block travels no farther than its last reader, its *reach* r_s <= P - 1, known to all from the layout. Received by
rank p, with t = (p - s) mod P the hops from rank s, n_s its tokens, e bytes an element and a bytes of the accumulation type:

    kv forward    sum over s with t <= r_s of n_s Hkv (K + V) e
    kv backward   the same, plus for the gradients (sum over s with 2 <= t <= r_s of n_s, plus n_p if r_p > 0) Hkv (K + V) a
    q backward    t = (s - p) mod P and reaches of queries: sum over t <= r_s of n_s H ((K + V) e + 2 a), and for the
                  gradients (sum over 2 <= t <= r_s of n_s, plus n_p if r_p > 0) H K a

Where all see all that is 2 (P - 1) n Hkv d elements forward (K = V = d), and backward 4 (P - 1) n Hkv d, or
3 (P - 1) n H d and two numbers a head and token.

Legend: T tokens held here, B tokens of the incoming state, P ranks, H heads, Hkv key heads, K, V widths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longhaul.models.errors import UserError
from longhaul.models.ops.attention import Mask, Piece, attend_varlen, attend_varlen_backward, merge
from longhaul.parallel.comm import Comm
from longhaul.parallel.shard import RankShard

from .base import Call, Engine, Gradients, Past, Shape, accumulation, cached, holdings
from .pieces import Held, by_document, needs, past_runs, visible
from .rotate import Homeward, Rotation

DIRECTIONS = ("auto", "kv", "q")


class Ring(Engine):
    """Keys and values go round; every layout, mask and number of heads.

    Args:
        backward: what moves in the backward: "kv", "q", or "auto" for whichever is fewer bytes.
    """

    name = "ring"

    def __init__(self, comm: Comm, backward: str = "auto") -> None:
        super().__init__(comm)
        if backward not in DIRECTIONS:
            raise UserError(f"Attention 'ring' moves one of {', '.join(DIRECTIONS)} in its backward, not {backward!r}.")
        self.backward = backward

    def call(self, shard: RankShard, shape: Shape, mask: Mask, scale: float, before: int, dtype: torch.dtype) -> Call:
        held = holdings(shard)
        route = cached(shard, (self.name, mask), lambda: Route(held, mask))
        return RingCall(self.comm, route, shape, scale, before, dtype, self.backward)


class Route:
    """Who needs whose tokens.

    Args:
        held: what each member of the ring holds.
    """

    def __init__(self, held: Sequence[Held], mask: Mask) -> None:
        self.held, self.mask = held, mask
        size = len(held)
        self.tokens = [member.num_tokens for member in held]
        self.key_reach, self.query_reach = [0] * size, [0] * size
        tables = [by_document(member.runs) for member in held]
        for reader in range(size):
            for source in range(size):
                if reader != source and needs(held[reader].runs, tables[source], mask):
                    hops = (reader - source) % size
                    self.key_reach[source] = max(self.key_reach[source], hops)
                    self.query_reach[reader] = max(self.query_reach[reader], hops)
        self._pieces: dict[tuple[int, int], list[Piece]] = {}

    def pieces(self, queries: int, keys: int) -> list[Piece]:
        """The work of one member's queries against another's keys."""
        if (queries, keys) not in self._pieces:
            self._pieces[queries, keys] = visible(self.held[queries].runs, self.held[keys].runs, self.mask)
        return self._pieces[queries, keys]

    def moves_queries(self, shape: Shape, element: int, wide: int) -> bool:
        """Whether queries are fewer bytes to move in the backward than keys and values."""
        heads, key_heads, key_width, value_width = shape
        both = key_width + value_width
        keys = sum(map(int.__mul__, self.key_reach, self.tokens)) * key_heads * both * (element + wide)
        per_query = heads * (both * element + (2 + key_width) * wide)
        return sum(map(int.__mul__, self.query_reach, self.tokens)) * per_query < keys


class RingCall(Call):
    """One attention over the members of `comm`, who hold what `route` says."""

    def __init__(
        self,
        comm: Comm,
        route: Route,
        shape: Shape,
        scale: float,
        before: int,
        dtype: torch.dtype,
        backward: str = "auto",
    ) -> None:
        assert comm.size == len(route.held), "one holding a member"
        self.comm, self.route, self.shape, self.scale = comm, route, shape, scale
        self.dtype, self.wide, self.window = dtype, accumulation(dtype), route.mask.window
        self.past_pieces = visible(route.held[comm.rank].runs, past_runs(before), route.mask)
        self.moves_queries = backward == "q" or (
            backward == "auto" and route.moves_queries(shape, dtype.itemsize, self.wide.itemsize)
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, past: Past) -> tuple[Tensor, Tensor]:
        me, widths = self.comm.rank, [self.shape.key_width, self.shape.value_width]
        rotation = self._keys_and_values(k, v, "kv forward")
        self.comm.ledger.mark("local start")
        out, lse = attend_varlen(q, k, v, self.route.pieces(me, me), self.scale, self.window)
        if past is not None and self.past_pieces:
            out, lse = merge(out, lse, *attend_varlen(q, *past, self.past_pieces, self.scale, self.window))
        self.comm.ledger.mark("local end")
        for _, source, block in rotation:
            pieces = self.route.pieces(me, source)
            if block is None or not pieces:
                continue
            keys, values = block[0].split(widths, dim=2)
            out, lse = merge(out, lse, *attend_varlen(q, keys, values, pieces, self.scale, self.window))
        return out, lse

    def _keys_and_values(self, k: Tensor, v: Tensor, label: str) -> Rotation:
        width = self.shape.key_width + self.shape.value_width

        def empty(rank: int) -> tuple[Tensor, ...]:
            return (k.new_empty(self.route.tokens[rank], self.shape.key_heads, width),)

        return Rotation(self.comm, (torch.cat([k, v], dim=2),), empty, self.route.key_reach, label)

    def backward(self, dout: Tensor, residuals: tuple[Tensor, ...], past: Past) -> Gradients:
        q, k, v, out, lse = residuals
        dout = dout.to(q.dtype)
        remote = self._backward_queries if self.moves_queries else self._backward_keys
        dq, dk, dv = remote(dout, q, k, v, out, lse)
        if past is None:
            return Gradients(dq, dk, dv, None)
        more = attend_varlen_backward(dout, q, *past, out, lse, self.past_pieces, self.scale, self.window)
        return Gradients(dq + more[0], dk, dv, torch.cat(more[1:], dim=2))

    def _own(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        me = self.comm.rank
        self.comm.ledger.mark("local start")
        grads = attend_varlen_backward(dout, q, k, v, out, lse, self.route.pieces(me, me), self.scale, self.window)
        self.comm.ledger.mark("local end")
        return grads

    def _backward_keys(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values go round again, their gradients follow them."""
        me, widths = self.comm.rank, [self.shape.key_width, self.shape.value_width]

        def empty(rank: int) -> Tensor:
            return k.new_empty(self.route.tokens[rank], self.shape.key_heads, sum(widths), dtype=self.wide)

        rotation = self._keys_and_values(k, v, "kv backward")
        homeward = Homeward(rotation, empty)
        dq, dk, dv = self._own(dout, q, k, v, out, lse)
        for hop, source, block in rotation:
            pieces, share = self.route.pieces(me, source), None
            if block is not None and pieces:
                keys, values = block[0].split(widths, dim=2)
                part = attend_varlen_backward(dout, q, keys, values, out, lse, pieces, self.scale, self.window)
                dq, share = dq + part[0], torch.cat(part[1:], dim=2)
            homeward.add(hop, share)
        total = homeward.total()
        if total is None:
            return dq, dk, dv
        more_k, more_v = total.split(widths, dim=2)
        return dq, dk + more_k, dv + more_v

    def _backward_queries(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, cotangents and two numbers a head go round the other way, the queries' gradients follow them."""
        me, (heads, _, key_width, value_width) = self.comm.rank, self.shape
        delta = (dout.to(self.wide) * out.to(self.wide)).sum(-1)  # [T, H]
        own = (torch.cat([q, dout], dim=2), torch.stack([lse.to(self.wide), delta], dim=2))

        def empty(rank: int) -> tuple[Tensor, ...]:
            tokens = self.route.tokens[rank]
            return q.new_empty(tokens, heads, key_width + value_width), delta.new_empty(tokens, heads, 2)

        def empty_sum(rank: int) -> Tensor:
            return delta.new_empty(self.route.tokens[rank], heads, key_width)

        rotation = Rotation(self.comm, own, empty, self.route.query_reach, "q backward", step=-1)
        homeward = Homeward(rotation, empty_sum)
        dq, dk, dv = self._own(dout, q, k, v, out, lse)
        for hop, source, block in rotation:
            pieces, share = self.route.pieces(source, me), None
            if block is not None and pieces:
                theirs, dtheirs = block[0].split([key_width, value_width], dim=2)
                stand_in = output_of(dtheirs, block[1][..., 1])
                part = attend_varlen_backward(
                    dtheirs, theirs, k, v, stand_in, block[1][..., 0], pieces, self.scale, self.window
                )
                share, dk, dv = part[0], dk + part[1], dv + part[2]
            homeward.add(hop, share)
        total = homeward.total()
        return dq if total is None else dq + total, dk, dv


def output_of(dout: Tensor, delta: Tensor) -> Tensor:
    """An output [T, H, V] whose product with `dout` [T, H, V] is `delta` [T, H]: all that a backward asks of it.

    One channel holds it all, the one where |dout| is largest: no larger than the true output's norm, so nothing overflows.
    """
    dout = dout.to(delta.dtype)
    where = dout.abs().argmax(-1, keepdim=True)
    divisor = dout.gather(-1, where)
    value = torch.where(divisor == 0, torch.zeros_like(divisor), delta[..., None] / divisor)
    return torch.zeros_like(dout).scatter_(-1, where, value)
