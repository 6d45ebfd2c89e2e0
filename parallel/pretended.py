"""One rank of a group whose other ranks are not there: what it would hold can be seen in one process.

Collectives take and give tensors of the sizes they always do, and send nothing. Values are those of a group in which every rank
has what this one has, as far as that costs nothing; nobody should read them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .comm import Comm, Handle, Ledger


class PretendedComm(Comm):
    """Collectives of rank `rank` of `size`, with nobody."""

    def __init__(self, size: int, rank: int = 0, ledger: Ledger | None = None) -> None:
        super().__init__(None, ledger)
        self.size, self.rank = size, rank

    def all_gather(self, x: Tensor, label: str) -> Handle:
        return _done(x[None] if self.size == 1 else x.expand(self.size, *x.shape).contiguous())

    def reduce_scatter(self, x: Tensor, label: str) -> Handle:
        return _done(x[0] if self.size == 1 else x.clone().sum(0))  # a copy of all blocks, as over gloo

    def all_reduce(self, x: Tensor, label: str, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Handle:
        return _done(x if self.size == 1 else x.clone())

    def all_to_all(self, blocks: Sequence[Tensor], shapes: Sequence[Sequence[int]], label: str) -> Handle:
        if self.size == 1:
            return _done(list(blocks))
        own = blocks[self.rank]
        sizes = [torch.Size(shape).numel() for shape in shapes]
        sent = torch.cat([block.reshape(-1) for block in blocks])  # noqa: F841, held until the answer is made
        out = own.new_zeros(sum(sizes)).split(sizes)
        for part in out:
            if part.numel() == own.numel():
                part.copy_(own.reshape(-1))
        return _done([part.reshape(tuple(shape)) for part, shape in zip(out, shapes)])

    def exchange(
        self, send: Sequence[tuple[int, Tensor]], receive: Sequence[tuple[int, Tensor]], label: str, tag: int = 0
    ) -> Handle:
        for _, buffer in receive:
            buffer.zero_()
        return _done([buffer for _, buffer in receive])

    def broadcast(self, x: Tensor, source: int, label: str) -> Handle:
        return _done(x if self.size == 1 else x.clone())


def _done(result: object) -> Handle:
    return Handle((), lambda: result, lambda: None)
