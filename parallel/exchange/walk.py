"""A running state that walks the chain from rank to rank, in blocks of its value axis.

No map mixes the columns of the value axis, so the state may be cut along it and each block sent on as soon as this rank
has applied its own maps to it: block j travels while block j + 1 is on its way here. Only states travel, never M, so a
rank receives one state for each of its runs that reads from another rank, whatever the kind of map: the lower bound.

A rank handles its runs in chain order, and sends block j together with its receive of block j + 1. So the messages of two
ranks match in order, and no order of the ranks can wait in a circle, with or without buffers in between.
"""

from __future__ import annotations

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
        # Blocks [N, ..., V / K] of the maps, of what enters each part, and of what enters the chain.
        self.maps = maps.split(blocks)
        self.entering_blocks = self.entering.tensor_split(blocks, dim=-1)
        self.initial_blocks = self.initial.tensor_split(blocks, dim=-1)
        self.end: Tensor | None = None
        self.sends: list[Handle] = []
        self.travel = self._travel()
        self.next: Handle | None = None
        own = [k for k, run in enumerate(runs) if run.owner == comm.rank]
        if blocking and own and (own[0] == 0 or not runs[own[0]].reads):
            return  # nothing to receive: what is sent waits for the local work all the same
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
        end = torch.empty_like(self.initial) if self.end is None else self.end
        return self.entering, self.comm.broadcast(end, self.runs[-1].owner, self.label).wait()

    def _travel(self) -> Iterator[Handle]:
        """Take the state through the runs held here; yields what must be waited for before it is resumed."""
        for k, run in enumerate(self.runs):
            if run.owner != self.comm.rank:
                continue
            source = self.runs[k - 1].owner if k and run.reads else None
            target = self.runs[k + 1].owner if k + 1 < len(self.runs) and self.runs[k + 1].reads else None
            leaving: list[Tensor] = []
            if source is None:
                for block, state in enumerate(self.initial_blocks):
                    leaving.append(pass_through(self.maps[block], run, state, self.entering_blocks[block]))
                    self._send(target, leaving[-1])
            else:
                yield from self._receive(run, source, target, leaving)
            if k + 1 == len(self.runs):
                self.end = torch.cat(leaving, dim=-1)

    def _receive(self, run: Run, source: int, target: int | None, leaving: list[Tensor]) -> Iterator[Handle]:
        buffers = [torch.empty_like(block, memory_format=torch.contiguous_format) for block in self.initial_blocks]
        if run.closed:
            # What leaves does not wait for what enters.
            handles = []
            for block, buffer in enumerate(buffers):
                leaving.append(pass_through(self.maps[block], run, torch.zeros_like(buffer)))
                handles.append(self._exchange(target, leaving[-1], source, buffer))
            for block, handle in enumerate(handles):
                yield handle
                pass_through(self.maps[block], run, buffers[block], self.entering_blocks[block])
            return
        handle = self._exchange(None, None, source, buffers[0])
        for block, buffer in enumerate(buffers):
            yield handle
            leaving.append(pass_through(self.maps[block], run, buffer, self.entering_blocks[block]))
            if block + 1 < len(buffers):
                handle = self._exchange(target, leaving[-1], source, buffers[block + 1])
        self._send(target, leaving[-1])

    def _exchange(self, target: int | None, leaving: Tensor | None, source: int, buffer: Tensor) -> Handle:
        send = [] if target is None or leaving is None else [(target, leaving)]
        return self.comm.exchange(send, [(source, buffer)], self.label, self.tag)

    def _send(self, target: int | None, leaving: Tensor) -> None:
        if target is not None:
            self.sends.append(self.comm.exchange([(target, leaving)], [], self.label, self.tag))
