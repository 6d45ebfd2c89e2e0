"""A running state that walks the chain from rank to rank, in blocks of its value axis.

No map mixes the columns of the value axis, so the state may be cut along it and each block sent on as soon as this rank
has applied its own maps to it: block j travels while block j + 1 is on its way here. Only states travel, never M, so a
rank receives one state for each of its runs that reads from another rank, whatever the kind of map: the lower bound.

Two ways to post the same messages:

`_Flow`, where messages match by tag (`Comm.tagged`, and tensors on the CPU). `start` posts every receive, sends what depends
on nothing from elsewhere, and leaves the rest to a courier, which passes each block on when it comes, beside the local work.
Every run has a tag of its own, so its blocks match whatever else is posted, and no post waits for another. Blocks are waited for
in the order of the waves below: the sender of one has only earlier ones to wait for, so ranks cannot wait in a circle.

`_Waves`, elsewhere, and where the first receive comes before the local work: block j of the state that leaves a run goes
one wave after it entered, and in wave 1 + j if it depends on nothing from elsewhere. All ranks know all waves, and post
what they send and receive in one wave together. So the messages of two ranks match in order, and ranks cannot wait for each
other in a circle, whatever the order of the parts and whether or not the backend buffers: all that belongs to the
lowest unfinished wave can always go on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future

import torch
from torch import Tensor

from longhaul.models.ops.affine import AffineMap
from longhaul.models.ops.recurrence import Pending
from longhaul.parallel.comm import Comm, Handle

from .base import Chain, Exchange, label, refuse_rounding
from .courier import Courier
from .runs import Run, make_runs, pass_through


class Walk(Exchange):
    """The running state goes rank to rank.

    Received by a rank, each way: (number of its runs that read from another rank) * (messages: K; bytes: one state of
    the accumulation dtype); with `want_end`, one message and one state more, except at the rank the chain ends on. A run
    is consecutive parts of one rank: one in a contiguous layout, two (the last rank: one) in zigzag.
    """

    name = "walk"
    blocking = False  # whether `start` waits for the first receive, so that local work follows it

    def __init__(self, comm: Comm, payload_dtype: str = "float32") -> None:
        refuse_rounding(self.name, payload_dtype)
        self.comm = comm
        self.courier = Courier()

    def num_blocks(self, state: Tensor) -> int:
        """K, for a state [*state_shape]; the same on every rank."""
        return 1

    def start(
        self,
        maps: AffineMap,
        chain: Chain,
        initial: Tensor | None = None,
        reverse: bool = False,
        want_end: bool = False,
    ) -> Pending:
        blocks = self.num_blocks(maps.offset[0])
        way = _Way(self.comm, maps, make_runs(chain, reverse), initial, label(reverse), want_end, blocks)
        if self.blocking or not self.comm.tagged or maps.offset.device.type != "cpu":
            return _Waves(way, self.blocking)
        return _Flow(way, self.courier)


class _Way:
    """The way through the runs: what entered and what leaves them, by run and block."""

    def __init__(
        self,
        comm: Comm,
        maps: AffineMap,
        runs: list[Run],
        initial: Tensor | None,
        label: str,
        want_end: bool,
        blocks: int,
    ) -> None:
        self.comm, self.runs, self.label, self.want_end = comm, runs, label, want_end
        self.initial = torch.zeros_like(maps.offset[0]) if initial is None else initial.to(maps.offset.dtype)
        self.entering = torch.zeros_like(maps.offset)
        # Blocks [N, ..., V / K] of the maps and of what enters each part, and [..., V / K] of what enters the chain.
        self.maps = maps.split(blocks)
        self.entering_blocks = self.entering.tensor_split(blocks, dim=-1)
        self.initial_blocks = [block.contiguous() for block in self.initial.tensor_split(blocks, dim=-1)]
        self.leaving: dict[tuple[int, int], Tensor] = {}

    def waves(self) -> dict[int, tuple[list[tuple[int, int]], list[tuple[int, int]]]]:
        """Wave -> what this rank sends, as (run it leaves, block), and what it receives, as (run it enters, block)."""
        waves: dict[int, tuple[list[tuple[int, int]], list[tuple[int, int]]]] = defaultdict(lambda: ([], []))
        wave = 0  # in which block 0 leaves the run before
        for k, (run, after) in enumerate(zip(self.runs, self.runs[1:])):
            wave = 1 if self.is_source(k) else wave + 1
            for block in range(len(self.maps) if after.reads else 0):
                if run.owner == self.comm.rank:
                    waves[wave + block][0].append((k, block))
                if after.owner == self.comm.rank:
                    waves[wave + block][1].append((k + 1, block))
        return dict(sorted(waves.items()))

    def is_source(self, k: int) -> bool:
        """Whether what leaves run k depends on nothing from elsewhere."""
        return k == 0 or self.runs[k].closed

    def begin(self) -> None:
        """What enters the chain enters the first run; what a run does not read counts as that too."""
        for k, run in enumerate(self.runs):
            if run.owner == self.comm.rank and (k == 0 or not run.reads):
                for block, state in enumerate(self.initial_blocks):
                    self.enter(k, block, state)

    def enter(self, k: int, block: int, state: Tensor) -> None:
        self.leaving[k, block] = pass_through(self.maps[block], self.runs[k], state, self.entering_blocks[block])

    def leave(self, k: int, block: int) -> tuple[int, Tensor]:
        """To whom the state goes that leaves a run, and the state."""
        if (k, block) not in self.leaving:
            # What leaves a closed run does not wait for what enters it.
            assert self.runs[k].closed, "only what has entered can leave"
            zero = torch.zeros_like(self.initial_blocks[block])
            return self.runs[k + 1].owner, pass_through(self.maps[block], self.runs[k], zero)
        return self.runs[k + 1].owner, self.leaving[k, block]

    def buffer(self, k: int, block: int) -> tuple[int, Tensor]:
        """From whom the state comes that enters a run, and where it shall be put."""
        return self.runs[k - 1].owner, torch.empty_like(self.initial_blocks[block])

    def finish(self) -> tuple[Tensor, Tensor | None]:
        """What `wait` gives, after all blocks have come."""
        if not self.want_end or not self.runs:
            return self.entering, self.initial if self.want_end else None
        last = len(self.runs) - 1
        blocks = [self.leaving.get((last, block), empty) for block, empty in enumerate(self.initial_blocks)]
        return self.entering, self.comm.broadcast(torch.cat(blocks, dim=-1), self.runs[last].owner, self.label).wait()


class _Flow:
    """All receives first, and each block goes on when it comes."""

    def __init__(self, way: _Way, courier: Courier) -> None:
        self.way = way
        self.tags = [way.comm.next_tag() for _ in way.runs]  # of the state that enters each run
        self.sends: list[Handle] = []
        waves = way.waves().values()
        self.arrivals = [(k, block, self._receive(k, block)) for _, receives in waves for k, block in receives]
        way.begin()
        forwards = False
        for k, block in [send for sends, _ in waves for send in sends]:
            if way.is_source(k):
                self._send(k, block)
            else:
                forwards = True
        self.errand: Future[None] | None = courier.run(self._walk) if forwards else None

    def wait(self) -> tuple[Tensor, Tensor | None]:
        if self.errand is None:
            self._walk()
        else:
            self.errand.result()
        for handle in self.sends:
            handle.wait()
        return self.way.finish()

    def _walk(self) -> None:
        for k, block, handle in self.arrivals:
            (state,) = handle.wait()
            self.way.enter(k, block, state)
            goes_on = k + 1 < len(self.way.runs) and self.way.runs[k + 1].reads
            if goes_on and not self.way.is_source(k):
                self._send(k, block)

    def _receive(self, k: int, block: int) -> Handle:
        return self.way.comm.exchange([], [self.way.buffer(k, block)], self.way.label, self.tags[k])

    def _send(self, k: int, block: int) -> None:
        self.sends.append(self.way.comm.exchange([self.way.leave(k, block)], [], self.way.label, self.tags[k + 1]))


class _Waves:
    """Wave by wave: the first in `start`, the others in `wait`."""

    def __init__(self, way: _Way, blocking: bool) -> None:
        self.way, self.tag = way, way.comm.next_tag()
        self.sends: list[Handle] = []
        self.travel = self._travel()
        self.next: Handle | None = None
        first = next(iter(way.waves().values()), None)
        if blocking and first is not None and not first[1]:
            return  # nothing to receive first: what is sent waits for the local work all the same
        self.next = next(self.travel, None)
        if blocking and self.next is not None:
            self.next.wait()

    def wait(self) -> tuple[Tensor, Tensor | None]:
        if self.next is not None:
            self.next.wait()
        for handle in self.travel:
            handle.wait()
        for handle in self.sends:
            handle.wait()
        return self.way.finish()

    def _travel(self) -> Iterator[Handle]:
        """Take the state through the runs held here; yields what must be waited for before it is resumed."""
        way = self.way
        way.begin()
        for sends, receives in way.waves().values():
            outgoing = [way.leave(k, block) for k, block in sends]
            incoming = [way.buffer(k, block) for k, block in receives]
            handle = way.comm.exchange(outgoing, incoming, way.label, self.tag)
            if not receives:
                self.sends.append(handle)
                continue
            yield handle
            for (k, block), state in zip(receives, handle.wait()):
                way.enter(k, block, state)
