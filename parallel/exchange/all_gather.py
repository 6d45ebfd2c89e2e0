"""LASP-2: one all-gather of segment maps, then every rank folds its own prefix.

Sun et al., "LASP-2: Rethinking Sequence Parallelism for Linear Attention and Its Hybrid" (arXiv 2502.07563), extended from
plain sums to any affine map. One collective each way, whatever the length; what a rank receives grows with the ranks,
`(P - 1) * N * n` elements of the accumulation dtype with n = state (+ linear part, where it must be told).
"""

from __future__ import annotations

import torch
from torch import Tensor

from longhaul.models.ops.affine import AffineMap
from longhaul.models.ops.chain import fold
from longhaul.models.ops.recurrence import Pending
from longhaul.parallel.comm import Comm, Handle

from .base import Chain, crosses, label, own_links


class AllGather:
    """One all-gather of maps each way."""

    name = "all_gather"

    def __init__(self, comm: Comm) -> None:
        self.comm = comm

    def start(
        self,
        maps: AffineMap,
        chain: Chain,
        initial: Tensor | None = None,
        reverse: bool = False,
        want_end: bool = False,
    ) -> Pending:
        payload = maps.pack()
        if crosses(chain) or want_end or initial is not None:
            handle = self.comm.all_gather(payload, label(reverse))
        else:
            # No document crosses a boundary: nothing enters any part, and all ranks know it.
            nothing = payload.new_zeros(self.comm.size, *payload.shape)
            handle = Handle((), lambda: nothing, lambda: None)
        return _Gathered(maps, chain, initial, reverse, self.comm.rank, handle)


class _Gathered:
    def __init__(
        self, maps: AffineMap, chain: Chain, initial: Tensor | None, reverse: bool, rank: int, handle: Handle
    ) -> None:
        self.maps, self.chain, self.initial, self.reverse = maps, chain, initial, reverse
        self.rank, self.handle = rank, handle

    def wait(self) -> tuple[Tensor, Tensor | None]:
        gathered: Tensor = self.handle.wait()  # [P, N, n]
        rows = torch.stack([gathered[link.owner, link.slot] for link in self.chain])  # [P * N, n] in chain order
        maps = self.maps.unpack(rows, [link.length for link in self.chain])
        entering, end = fold(maps, self.chain, self.initial, self.reverse)
        return entering[own_links(self.chain, self.rank)], end
