"""A running state that walks the chain from rank to rank, in blocks of its value axis.

No map mixes the columns of the value axis, so the state may be cut along it and each block sent on as soon as this rank
has applied its own maps to it: block j travels while block j + 1 is on its way here. Only states travel, never M, so a
rank receives one state for each of its runs that reads from another rank, whatever the kind of map: the lower bound.

Messages are posted in waves: block j of the state that leaves a run goes one wave after it entered, and in wave 1 + j if
it depends on nothing from elsewhere. All ranks know all waves, and post what they send and receive in one wave together. So
the messages of two ranks match in order, and ranks cannot wait for each other in a circle, whatever the order of the parts
and whether or not the backend buffers: all that belongs to the lowest unfinished wave can always go on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from longhaul.models.ops.affine import AffineMap
from longhaul.models.ops.recurrence import Pending
from longhaul.parallel.comm import Comm, Handle

from .base import Chain, Exchange, label, refuse_rounding
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
        return _Walking(self.comm, maps, make_runs(chain, reverse), initial, label(reverse), want_end, blocks, self.blocking)


class _Walking:
    def __init__(
        self,
        comm: Comm,
        maps: AffineMap,
        runs: list[Run],
        initial: Tensor | None,
        label: str,
        want_end: bool,
        blocks: int,
        blocking: bool,
    ) -> None:
        self.comm, self.runs, self.label, self.want_end = comm, runs, label, want_end
        self.tag = comm.next_tag()
        self.initial = torch.zeros_like(maps.offset[0]) if initial is None else initial.to(maps.offset.dtype)
        self.entering = torch.zeros_like(maps.offset)
        # Blocks [N, ..., V / K] of the maps and of what enters each part, and [..., V / K] of what enters the chain.
        self.maps = maps.split(blocks)
        self.entering_blocks = self.entering.tensor_split(blocks, dim=-1)
        self.initial_blocks = [block.contiguous() for block in self.initial.tensor_split(blocks, dim=-1)]
        self.leaving: dict[tuple[int, int], Tensor] = {}  # by run and block
        self.sends: list[Handle] = []
        self.travel = self._travel()
        self.next: Handle | None = None
        waves = self._waves()
        if blocking and waves and not waves[min(waves)][1]:
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
        if not self.want_end or not self.runs:
            return self.entering, self.initial if self.want_end else None
        last = len(self.runs) - 1
        blocks = [self.leaving.get((last, block), empty) for block, empty in enumerate(self.initial_blocks)]
        return self.entering, self.comm.broadcast(torch.cat(blocks, dim=-1), self.runs[last].owner, self.label).wait()

    def _waves(self) -> dict[int, tuple[list[tuple[int, int]], list[tuple[int, int]]]]:
        """Wave -> what this rank sends, as (run it leaves, block), and what it receives, as (run it enters, block)."""
        waves: dict[int, tuple[list[tuple[int, int]], list[tuple[int, int]]]] = defaultdict(lambda: ([], []))
        wave = 0  # in which block 0 leaves the run before
        for k, (run, after) in enumerate(zip(self.runs, self.runs[1:])):
            wave = 1 if k == 0 or run.closed else wave + 1
            for block in range(len(self.maps) if after.reads else 0):
                if run.owner == self.comm.rank:
                    waves[wave + block][0].append((k, block))
                if after.owner == self.comm.rank:
                    waves[wave + block][1].append((k + 1, block))
        return waves

    def _travel(self) -> Iterator[Handle]:
        """Take the state through the runs held here; yields what must be waited for before it is resumed."""
        for k, run in enumerate(self.runs):
            if run.owner == self.comm.rank and (k == 0 or not run.reads):
                for block, state in enumerate(self.initial_blocks):
                    self._enter(k, block, state)
        for _, (sends, receives) in sorted(self._waves().items()):
            handle = self.comm.exchange(
                [(self.runs[k + 1].owner, self._leave(k, block)) for k, block in sends],
                [(self.runs[k - 1].owner, torch.empty_like(self.initial_blocks[block])) for k, block in receives],
                self.label,
                self.tag,
            )
            if not receives:
                self.sends.append(handle)
                continue
            yield handle
            for (k, block), state in zip(receives, handle.wait()):
                self._enter(k, block, state)

    def _enter(self, k: int, block: int, state: Tensor) -> None:
        self.leaving[k, block] = pass_through(self.maps[block], self.runs[k], state, self.entering_blocks[block])

    def _leave(self, k: int, block: int) -> Tensor:
        if (k, block) in self.leaving:
            return self.leaving[k, block]
        # What leaves a closed run does not wait for what enters it.
        assert self.runs[k].closed, "a wave depends on earlier ones only"
        return pass_through(self.maps[block], self.runs[k], torch.zeros_like(self.initial_blocks[block]))
