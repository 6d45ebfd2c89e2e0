"""Blocks that go from rank to rank round a ring, and sums that follow them and go home.

At hop `t` a rank holds the block of the rank `t` places back. A block travels only as far as somebody needs it, its
*reach*; every rank knows all reaches from the layout, so both ends of a link agree on which messages exist.

Each hop's message is posted before the work on the block that came with the one before it.

Legend: P ranks, t hop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from longhaul.parallel.comm import Comm, Handle

Blocks = tuple[Tensor, ...]


class Rotation:
    """A block of each rank on its way round.

    Args:
        own: this rank's block, a tuple of tensors.
        empty: from a rank to buffers for its block.
        reach: hops that each rank's block travels.
        step: 1 to send to the next rank, -1 to the one before.
    """

    def __init__(
        self, comm: Comm, own: Blocks, empty: Callable[[int], Blocks], reach: Sequence[int], label: str, step: int = 1
    ) -> None:
        self.comm, self.empty, self.reach, self.label, self.step = comm, empty, reach, label, step
        self.hops = max(reach, default=0)
        self._tag = comm.next_tag()
        self._pending = self._post(1, own)

    def source(self, hop: int) -> int:
        """Whose block is here at `hop`."""
        return (self.comm.rank - self.step * hop) % self.comm.size

    def _post(self, hop: int, held: Blocks | None) -> Handle | None:
        leaving, coming = self.source(hop - 1), self.source(hop)
        send: list[tuple[int, Tensor]] = []
        receive: list[tuple[int, Tensor]] = []
        if hop <= self.reach[leaving]:
            assert held is not None, "a block is here at every hop before its last"
            send = [((self.comm.rank + self.step) % self.comm.size, block) for block in held]
        if hop <= self.reach[coming]:
            receive = [((self.comm.rank - self.step) % self.comm.size, block) for block in self.empty(coming)]
        return self.comm.exchange(send, receive, self.label, self._tag) if send or receive else None

    def __iter__(self) -> Iterator[tuple[int, int, Blocks | None]]:
        """(hop, source, its block or None if it does not come this far), for every hop of any block."""
        for hop in range(1, self.hops + 1):
            received = [] if self._pending is None else self._pending.wait()
            held = tuple(received) if received else None
            self._pending = self._post(hop + 1, held)
            yield hop, self.source(hop), held
        if self._pending is not None:
            self._pending.wait()


class Homeward:
    """Sums that follow the blocks of a `Rotation` rank by rank, and go home from the last.

    Args:
        rotation: whose blocks are followed.
        empty: from a rank to a buffer for the sum that belongs to its block.
    """

    def __init__(self, rotation: Rotation, empty: Callable[[int], Tensor]) -> None:
        self.rotation, self.empty, self.comm = rotation, empty, rotation.comm
        self._tag = self.comm.next_tag()
        self._pending: Handle | None = None
        self._follows = self._comes_home = False
        self._total: Tensor | None = None

    def _receive(self) -> Tensor | None:
        """Finish the last hop's messages; the sum that came for the block held now."""
        if self._pending is None:
            return None
        buffers = list(self._pending.wait())
        self._pending = None
        if self._comes_home:
            self._total = buffers.pop()
        return buffers[0] if self._follows else None

    def add(self, hop: int, share: Tensor | None) -> None:
        """Add this rank's share to the sum of the block held at `hop` (None: it is not here, or nothing is added)."""
        rotation, size = self.rotation, self.comm.size
        arrived = self._receive()
        rank, reach, source = self.comm.rank, rotation.reach, rotation.source(hop)
        send: list[tuple[int, Tensor]] = []
        receive: list[tuple[int, Tensor]] = []
        if hop <= reach[source]:
            total = arrived if arrived is not None else torch.zeros_like(self.empty(source))
            if share is not None:
                total = total + share
            send = [((rank + rotation.step) % size if hop < reach[source] else source, total)]
        following = rotation.source(hop + 1)
        self._follows, self._comes_home = hop + 1 <= reach[following], hop == reach[rank]
        if self._follows:
            receive.append(((rank - rotation.step) % size, self.empty(following)))
        if self._comes_home:
            receive.append(((rank + rotation.step * hop) % size, self.empty(rank)))
        if send or receive:
            self._pending = self.comm.exchange(send, receive, rotation.label, self._tag)

    def total(self) -> Tensor | None:
        """What others added to this rank's block, after the last hop; None if it went nowhere."""
        self._receive()
        return self._total
