"""LASP-2: one all-gather of segment maps, then every rank folds its own prefix.

Sun et al., "LASP-2: Rethinking Sequence Parallelism for Linear Attention and Its Hybrid" (arXiv 2502.07563), extended from
plain sums to any affine map. One collective each way, whatever the length; what a rank receives grows with the ranks.

Legend: P ranks, N parts of a rank, n numbers of a packed map, u of them its offset U.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longhaul.models.errors import UserError
from longhaul.models.ops.affine import AffineMap
from longhaul.models.ops.chain import fold
from longhaul.models.ops.recurrence import Pending
from longhaul.parallel.comm import Comm, Handle

from .base import Chain, Exchange, crosses, label, own_links
from .runs import Window, make_runs, window_of
from .walk import Walk


class AllGather(Exchange):
    """One all-gather of maps each way.

    Received by a rank, each way: P - 1 messages, `(P - 1) * N * n` numbers of the accumulation dtype; nothing if no document
    goes on from one part into another, unless the end of the chain is wanted.

    Args:
        payload_dtype: "float32": the accumulation dtype (float32, or wider for wider inputs). "bfloat16": offsets U are
            sent as bfloat16 and folded in the accumulation dtype, so that the error does not grow with the ranks. The
            linear parts M, which multiply once per rank, travel unrounded (log sums above all), as bytes:
            `(P - 1) * N * (2 u + (n - u) * size of an accumulation number)` bytes.
    """

    name = "all_gather"

    def __init__(self, comm: Comm, payload_dtype: str = "float32") -> None:
        if payload_dtype not in ("float32", "bfloat16"):
            raise UserError(f"payload_dtype {payload_dtype!r} is neither 'float32' nor 'bfloat16'.")
        self.comm, self.rounds = comm, payload_dtype == "bfloat16"

    def start(
        self,
        maps: AffineMap,
        chain: Chain,
        initial: Tensor | None = None,
        reverse: bool = False,
        want_end: bool = False,
    ) -> Pending:
        if not crosses(chain) and not want_end:
            return Walk(self.comm).start(maps, chain, initial, reverse)  # which sends nothing
        return _States(self._gather(maps, chain, reverse), initial)

    def start_windows(self, maps: AffineMap, chain: Chain, reverse: bool) -> PendingWindows:
        """The prefix as maps: see `Hierarchical`."""
        return PendingWindows(self._gather(maps, chain, reverse))

    def _gather(self, maps: AffineMap, chain: Chain, reverse: bool) -> _Gathering:
        handle = self.comm.all_gather(_round(maps) if self.rounds else maps.pack(), label(reverse))
        return _Gathering(maps, chain, reverse, self.comm.rank, handle, self.rounds)


class _Gathering:
    def __init__(
        self, maps: AffineMap, chain: Chain, reverse: bool, rank: int, handle: Handle, rounds: bool
    ) -> None:
        self.maps, self.chain, self.reverse, self.rank = maps, chain, reverse, rank
        self.handle, self.rounds = handle, rounds

    def finish(self) -> AffineMap:
        """The maps of all parts, in chain order."""
        gathered: Tensor = self.handle.wait()  # [P, N, n]
        rows = torch.stack([gathered[link.owner, link.slot] for link in self.chain])  # [P * N, n] in chain order
        if self.rounds:
            rows = _widen(rows, self.maps)
        return self.maps.unpack(rows, [link.length for link in self.chain])


class _States:
    def __init__(self, gathering: _Gathering, initial: Tensor | None) -> None:
        self.gathering, self.initial = gathering, initial

    def wait(self) -> tuple[Tensor, Tensor | None]:
        chain = self.gathering.chain
        entering, end = fold(self.gathering.finish(), chain, self.initial, self.gathering.reverse)
        return entering[own_links(chain, self.gathering.rank)], end


class PendingWindows:
    """A prefix of maps under way."""

    def __init__(self, gathering: _Gathering) -> None:
        self.gathering = gathering

    def wait(self) -> tuple[Window | None, Window | None]:
        """The map of all that comes before this rank's part (None: nothing), and of the whole chain (None: no tokens)."""
        gathering = self.gathering
        maps = gathering.finish()
        before: Window | None = None
        total: Window | None = None
        for run in make_runs([link._replace(slot=k) for k, link in enumerate(gathering.chain)], gathering.reverse):
            if run.owner == gathering.rank:
                before = total
            window = window_of(maps, run.steps)
            assert window is not None, "a run has tokens"
            total = window.after(total)
        return before, total


def _split(maps: AffineMap) -> tuple[Tensor, Tensor]:
    """The packed offsets [N, u] and the packed linear parts [N, n - u]."""
    packed = maps.pack()
    size = maps.offset[0].numel() * (2 if maps.offset.is_complex() else 1)
    return packed[:, :size], packed[:, size:].contiguous()


def _round(maps: AffineMap) -> Tensor:
    """Packed maps as bytes, which every backend can send: U rounded to bfloat16, M bit by bit."""
    offset, linear = _split(maps)
    pieces = [offset.to(torch.bfloat16).view(torch.uint8)]
    if linear.numel():
        pieces.append(linear.view(torch.uint8))
    return torch.cat(pieces, dim=1)


def _widen(payload: Tensor, like: AffineMap) -> Tensor:
    """The inverse of `_round`, for maps like `like`."""
    size = 2 * like.offset[0].numel() * (2 if like.offset.is_complex() else 1)
    dtype = like.offset.real.dtype
    offset = payload[:, :size].contiguous().view(torch.bfloat16).to(dtype)
    linear = payload[:, size:].contiguous()
    return torch.cat([offset, linear.view(dtype)], dim=1) if linear.numel() else offset
