"""Log-depth scan (Hillis & Steele, "Data parallel algorithms", 1986): ceil(log2 R) steps for R runs, any R.

At step d = 1, 2, 4, ... run i holds the map of runs `i - d + 1 .. i` (its window) and of the same without i, and gets the
window of run `i - d`, which doubles both. Maps are composed on the way, so M travels. A window that holds a cut ignores what
enters; every rank knows from the chain where that is, so nothing about it is sent, and nothing is sent to a run that needs
no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

import torch
from torch import Tensor

from longhaul.models.ops.affine import AffineMap
from longhaul.models.ops.recurrence import Pending
from longhaul.parallel.comm import Comm, Handle

from .base import Chain, Exchange, label, refuse_rounding
from .courier import Courier
from .runs import Run, Window, make_runs, pass_through, window_of


class LogScan(Exchange):
    """Hillis-Steele scan of maps over runs (consecutive parts of one rank).

    Received by a rank, each way: for each of its runs i that reads, one message of one packed map for every d = 1, 2, 4, ..
    <= i for which run i - d is another rank's and no run between i - d and i is cut: at most ceil(log2 R). With
    `want_end`, one message and one state more, except at the rank the chain ends on.
    """

    name = "log_scan"

    def __init__(self, comm: Comm, payload_dtype: str = "float32") -> None:
        refuse_rounding(self.name, payload_dtype)
        self.comm = comm
        self.courier = Courier()

    def start(
        self,
        maps: AffineMap,
        chain: Chain,
        initial: Tensor | None = None,
        reverse: bool = False,
        want_end: bool = False,
    ) -> Pending:
        runs = make_runs(chain, reverse)
        return _States(_Scanning(self.comm, maps, runs, label(reverse), self.courier), initial, want_end)

    def start_windows(self, maps: AffineMap, chain: Chain, reverse: bool) -> PendingWindows:
        """The prefix as maps: see `Hierarchical`. The total costs every rank but the last one packed map more."""
        return PendingWindows(_Scanning(self.comm, maps, make_runs(chain, reverse), label(reverse), self.courier))


def sources(runs: list[Run], index: int) -> Iterator[tuple[int, int]]:
    """At which steps d a run gets a window, and of which run."""
    d = 1
    while d <= index and runs[index].reads and not any(run.closed for run in runs[index - d + 1 : index]):
        yield d, index - d
        d *= 2


class _Scanning:
    """The scan under way: after `finish`, `before[i]` is the map of all runs before i, for the runs held here.

    The first step is posted at once. Where messages match by tag a courier takes the others beside the local work.
    """

    def __init__(self, comm: Comm, maps: AffineMap, runs: list[Run], label: str, courier: Courier) -> None:
        self.comm, self.maps, self.runs, self.label = comm, maps, runs, label
        self.tag = comm.next_tag()
        self.own = [k for k, run in enumerate(runs) if run.owner == comm.rank]
        windows = {k: window_of(maps, runs[k].steps) for k in self.own}
        self.upto: dict[int, Window] = {k: window for k, window in windows.items() if window is not None}
        self.before: dict[int, Window] = {}
        self.steps = self._scan()
        self.next = next(self.steps, None)
        self.errand: Future[None] | None = None
        if self.next is not None and comm.tagged and maps.offset.device.type == "cpu" and len(runs) > 2:  # several steps
            self.errand = courier.run(self._finish)

    def finish(self) -> None:
        if self.errand is None:
            self._finish()
        else:
            self.errand.result()

    def _finish(self) -> None:
        if self.next is not None:
            self.next.wait()
        for handle in self.steps:
            handle.wait()

    def _scan(self) -> Iterator[Handle]:
        like = self.maps.select([0]).pack()
        wanted = [dict(sources(self.runs, k)) for k in range(len(self.runs))]
        d = 1
        while d < len(self.runs):
            send, receive, arrived = [], [], {}
            for k, steps in enumerate(wanted):
                if d not in steps:
                    continue
                here, there = self.runs[k].owner, self.runs[k - d].owner
                if there == here == self.comm.rank:
                    arrived[k] = self.upto[k - d]
                elif there == self.comm.rank:
                    send.append((here, self.upto[k - d].maps.pack()))
                elif here == self.comm.rank:
                    receive.append((k, there, torch.empty_like(like)))
            if send or receive:
                buffers = [(there, buffer) for _, there, buffer in receive]
                yield self.comm.exchange(send, buffers, self.label, self.tag)
            for k, _, buffer in receive:
                first = max(0, k - 2 * d + 1)
                length = sum(run.length for run in self.runs[first : k - d + 1])
                closed = any(run.closed for run in self.runs[first : k - d + 1])
                arrived[k] = Window(self.maps.unpack(buffer, [length]), closed)
            for k, window in arrived.items():
                earlier = self.before.get(k)
                self.before[k] = window if earlier is None else earlier.after(window)
                self.upto[k] = self.upto[k].after(window)
            d *= 2


class _States:
    def __init__(self, scan: _Scanning, initial: Tensor | None, want_end: bool) -> None:
        self.scan, self.initial, self.want_end = scan, initial, want_end

    def wait(self) -> tuple[Tensor, Tensor | None]:
        scan = self.scan
        scan.finish()
        entering = torch.zeros_like(scan.maps.offset)
        zero = entering[0].clone()
        initial = zero if self.initial is None else self.initial.to(zero.dtype)
        end = initial
        for k in scan.own:
            before = scan.before.get(k)
            # `pass_through` takes zero for a run that reads nothing.
            state = initial if before is None else before.apply(None if self.initial is None else initial)
            end = pass_through(scan.maps, scan.runs[k], state, entering)
        if not self.want_end or not scan.runs:
            return entering, initial if self.want_end else None
        owner = scan.runs[-1].owner
        return entering, scan.comm.broadcast(end if owner == scan.comm.rank else zero, owner, scan.label).wait()


class PendingWindows:
    """A prefix of maps under way."""

    def __init__(self, scan: _Scanning) -> None:
        self.scan = scan

    def wait(self) -> tuple[Window | None, Window | None]:
        """The map of all that comes before this rank's run (None: nothing), and of the whole chain (None: no tokens)."""
        scan = self.scan
        scan.finish()
        assert len(scan.own) <= 1, "a rank of a node holds one part"
        before = scan.before.get(scan.own[0]) if scan.own else None
        if not scan.runs:
            return None, None
        last = len(scan.runs) - 1
        mine = scan.upto[last].maps if last in scan.own else scan.maps.select([0])
        payload = scan.comm.broadcast(mine.pack(), scan.runs[-1].owner, scan.label).wait()
        length, closed = sum(run.length for run in scan.runs), any(run.closed for run in scan.runs)
        return before, Window(scan.maps.unpack(payload, [length]), closed)
