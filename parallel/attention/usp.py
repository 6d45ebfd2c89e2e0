"""USP: Ulysses inside groups of u ranks, ring attention across them.

Fang and Zhao (arXiv 2405.07719); the two-dimensional attention of LoongTrain (arXiv 2406.18485). Rank `g u + i` is member i of
group g. After the all-to-all inside the group it holds the group's tokens for its share of the heads, and goes round a
ring with the members i of the other groups.

Received: what `ulysses` says inside the group (N the group's tokens), plus what `ring` says for the group's tokens, the
member's heads, and P = groups. Where all divides, forward (2 H + 2 Hkv) n d (u - 1) / u + 2 (P / u - 1) n Hkv d elements.

Legend: u ranks a group, P ranks, H heads, Hkv key heads.
"""

from __future__ import annotations

import torch

from longhaul.models.errors import UserError
from longhaul.models.ops.attention import Mask
from longhaul.parallel.comm import Comm
from longhaul.parallel.shard import RankShard

from .base import Call, Engine, Shape, cached
from .pieces import Held, held_by
from .ring import Route
from .ulysses import HeadCall


class Usp(Engine):
    """All-to-all over heads in the inner group, a ring over the outer one.

    Args:
        comm: the sequence group.
        inner: its ranks `g u .. (g + 1) u`, with this one among them.
        outer: its ranks `i, i + u, ...`.
    """

    name = "usp"

    def __init__(self, comm: Comm, inner: Comm | None = None, outer: Comm | None = None) -> None:
        super().__init__(comm)
        if inner is None or outer is None:
            raise UserError("Attention 'usp' needs the groups inside and across; give inner and outer, or use ulysses or ring.")
        if inner.size * outer.size != comm.size:
            raise UserError(
                f"Attention 'usp' wants inner x outer = {comm.size} ranks, but {inner.size} x {outer.size} is "
                f"{inner.size * outer.size}; choose a divisor of {comm.size} as the inner size."
            )
        if (outer.rank, inner.rank) != divmod(comm.rank, inner.size):
            raise UserError(
                f"Attention 'usp' wants groups of consecutive ranks, but rank {comm.rank} is member {inner.rank} of group "
                f"{outer.rank} of size {inner.size}; make inner of ranks g u .. (g + 1) u."
            )
        self.inner, self.outer = inner, outer

    def call(self, shard: RankShard, shape: Shape, mask: Mask, scale: float, before: int, dtype: torch.dtype) -> Call:
        size = self.inner.size

        def make() -> tuple[list[Held], Route]:
            groups = [range(first, first + size) for first in range(0, self.comm.size, size)]
            held = [held_by(shard.layout, shard.documents, group) for group in groups]
            return held, Route(held, mask)

        held, route = cached(shard, (self.name, size, mask), make)
        return HeadCall(self.inner, self.outer, held[self.outer.rank], route, shape, scale, before, dtype)
