"""Collectives on one process group: one thin wrapper that counts what it sends and returns handles.

Every byte between ranks goes through `Comm`, so `Ledger` can tell what a step cost and tests can assert the formula.
Bytes are payload *received* by this rank, which is what limits a collective; a rank's own block is not counted.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renames these two and warns at the old names.
_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Count:
    """Calls, messages and payload bytes of one kind of traffic, as this rank received them."""

    __slots__ = ("bytes", "calls", "messages")

    def __init__(self) -> None:
        self.calls = self.messages = self.bytes = 0

    def __repr__(self) -> str:
        return f"Count(calls={self.calls}, messages={self.messages}, bytes={self.bytes})"


class Ledger:
    """What crossed the wire, by (label, collective), and an ordered log of events."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], Count] = defaultdict(Count)
        self.events: list[str] | None = None
        self._lock = threading.Lock()  # couriers send from threads of their own

    def add(self, label: str, kind: str, messages: int, size: int) -> None:
        with self._lock:
            count = self.counts[label, kind]
            count.calls += 1
            count.messages += messages
            count.bytes += size

    def mark(self, event: str) -> None:
        """Append to the event log, if one is being kept (`ledger.events = []` starts one)."""
        if self.events is not None:
            self.events.append(event)

    def total(self, label: str | None = None) -> Count:
        """The sum over kinds, of one label or of all."""
        result = Count()
        for (name, _), count in self.counts.items():
            if label is None or name == label:
                result.calls += count.calls
                result.messages += count.messages
                result.bytes += count.bytes
        return result

    def reset(self) -> None:
        self.counts.clear()


class Wire:
    """A slower link, emulated in-process.

    A collective arrives no earlier than `delay + bytes / bandwidth` after this rank posted it. A point-to-point message
    arrives no earlier than that after its *sender* posted it, and messages of one sender leave one after the other.

    Args:
        delay: seconds.
        bandwidth: bytes per second; None is unlimited.
    """

    def __init__(self, delay: float = 0.0, bandwidth: float | None = None) -> None:
        self.delay, self.bandwidth = delay, bandwidth
        self._busy_until = 0.0
        self._lock = threading.Lock()

    def arrival(self, size: int) -> float:
        """When a collective posted now is there."""
        return time.perf_counter() + self.delay + self._duration(size)

    def send(self, size: int) -> float:
        """When a message sent now is there."""
        with self._lock:
            self._busy_until = max(time.perf_counter(), self._busy_until) + self._duration(size)
            return self._busy_until + self.delay

    def _duration(self, size: int) -> float:
        return size / self.bandwidth if self.bandwidth else 0.0


class Handle:
    """A collective under way. `wait` returns its result; a second `wait` returns it again."""

    def __init__(self, works: Sequence[Any], result: Callable[[], Any], finish: Callable[[], None]) -> None:
        self._works, self._result, self._finish = works, result, finish
        self._value: Any = None
        self._waited = False

    def wait(self) -> Any:
        if not self._waited:
            for work in self._works:
                work.wait()
            self._finish()
            self._value, self._waited = self._result(), True
            self._works = ()
        return self._value


class Comm:
    """Collectives over one group.

    Args:
        group: the process group; None is a group of this process alone, in which nothing is sent.
        ledger: where traffic is counted.
        wire: an emulated slower link.
    """

    def __init__(self, group: dist.ProcessGroup | None, ledger: Ledger | None = None, wire: Wire | None = None) -> None:
        self.group = group
        self.ledger = ledger if ledger is not None else Ledger()
        self.wire = wire
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self._tags = 0

    @property
    def tagged(self) -> bool:
        """Whether messages match by tag, in whatever order ranks post those of different tags."""
        return self.group is not None and dist.get_backend(self.group) == "gloo"

    def next_tag(self) -> int:
        """A tag for a group of point-to-point messages; all ranks must ask for theirs in one order."""
        self._tags = self._tags % 2**20 + 1
        return self._tags

    def _post(
        self,
        label: str,
        kind: str,
        messages: int,
        size: int,
        works: Sequence[Any],
        result: Callable[[], Any],
        arrival: Callable[[], float] | None = None,
    ) -> Handle:
        self.ledger.add(label, kind, messages, size)
        self.ledger.mark(f"post {label}")
        if self.wire is not None and arrival is None:
            there = self.wire.arrival(size)
            arrival = lambda: there  # noqa: E731

        def finish() -> None:
            if arrival is not None:
                time.sleep(max(0.0, arrival() - time.perf_counter()))
            self.ledger.mark(f"wait {label}")

        return Handle(works, result, finish)

    def all_gather(self, x: Tensor, label: str) -> Handle:
        """Every rank's `x`: [...] -> [P, ...]. All ranks pass the same shape."""
        if self.size == 1:
            return Handle((), lambda: x[None], lambda: None)
        flat = x.contiguous().reshape(-1)
        out = flat.new_empty(self.size * flat.numel())
        work = _gather_flat(out, flat, group=self.group, async_op=True)
        size = (self.size - 1) * _bytes(x)
        return self._post(label, "all_gather", self.size - 1, size, [work], lambda: out.reshape(self.size, *x.shape))

    def reduce_scatter(self, x: Tensor, label: str) -> Handle:
        """The sum over ranks of this rank's block: [P, ...] -> [...], added in rank order."""
        if self.size == 1:
            return Handle((), lambda: x[0], lambda: None)
        flat = x.contiguous().reshape(-1)
        size = (self.size - 1) * _bytes(x) // self.size
        if dist.get_backend(self.group) == "gloo":
            # gloo's own is an all-reduce, twice the bytes.
            blocks = torch.empty_like(flat)
            work = dist.all_to_all_single(blocks, flat, group=self.group, async_op=True)
            return self._post(label, "reduce_scatter", self.size - 1, size, [work], lambda: blocks.reshape(x.shape).sum(0))
        out = flat.new_empty(flat.numel() // self.size)
        work = _scatter_flat(out, flat, group=self.group, async_op=True)
        return self._post(label, "reduce_scatter", self.size - 1, size, [work], lambda: out.reshape(x.shape[1:]))

    def all_reduce(self, x: Tensor, label: str, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Handle:
        """The sum (or another reduction) over ranks; counted as 2 (P - 1) / P of the payload, the ring's traffic."""
        if self.size == 1:
            return Handle((), lambda: x, lambda: None)
        out = x.contiguous().clone()
        work = dist.all_reduce(out, op=op, group=self.group, async_op=True)
        size = 2 * (self.size - 1) * _bytes(out) // self.size
        return self._post(label, "all_reduce", 2 * (self.size - 1), size, [work], lambda: out)

    def all_to_all(self, blocks: Sequence[Tensor], shapes: Sequence[Sequence[int]], label: str) -> Handle:
        """Block `p` to rank `p`; returns the blocks received, of the given shapes. Blocks may be empty."""
        if self.size == 1:
            return Handle((), lambda: list(blocks), lambda: None)
        like = blocks[0]
        sizes = [torch.Size(shape).numel() for shape in shapes]
        out = like.new_empty(sum(sizes))
        send = torch.cat([block.reshape(-1) for block in blocks])
        work = dist.all_to_all_single(
            out, send, sizes, [block.numel() for block in blocks], group=self.group, async_op=True
        )
        remote = [size for peer, size in enumerate(sizes) if peer != self.rank]
        return self._post(
            label,
            "all_to_all",
            sum(size > 0 for size in remote),
            sum(remote) * like.element_size(),
            [work],
            lambda: [part.reshape(tuple(shape)) for part, shape in zip(out.split(sizes), shapes)],
        )

    def exchange(
        self,
        send: Sequence[tuple[int, Tensor]],
        receive: Sequence[tuple[int, Tensor]],
        label: str,
        tag: int = 0,
    ) -> Handle:
        """Point to point: tensors to send with their target ranks, buffers to fill with their source ranks.

        Returns a handle on the filled buffers. Between two ranks, sends and receives of one tag match in order.
        """
        outgoing = [(peer, _plain(x.contiguous())) for peer, x in send]
        incoming = [(peer, _plain(buffer)) for peer, buffer in receive]
        arrival: Callable[[], float] | None = None
        if self.wire is not None:
            # The receiver cannot see when a message was sent, so the emulation says it in a message of its own.
            outgoing += [(peer, torch.tensor([self.wire.send(_bytes(x))], dtype=torch.float64)) for peer, x in outgoing]
            stamps = [torch.zeros(1, dtype=torch.float64) for _ in incoming]
            incoming += [(peer, stamp) for (peer, _), stamp in zip(list(incoming), stamps)]
            arrival = lambda: max((stamp.item() for stamp in stamps), default=0.0)  # noqa: E731
        # Sends before receives and one batch: a rank that posts in another order than its peer would hang.
        operations = [dist.P2POp(dist.isend, x, self._global(peer), self.group, tag) for peer, x in outgoing]
        operations += [dist.P2POp(dist.irecv, x, self._global(peer), self.group, tag) for peer, x in incoming]
        works = dist.batch_isend_irecv(operations) if operations else []
        size = sum(_bytes(buffer) for _, buffer in receive)
        return self._post(label, "p2p", len(receive), size, works, lambda: [buffer for _, buffer in receive], arrival)

    def broadcast(self, x: Tensor, source: int, label: str) -> Handle:
        """`x` of rank `source` to all; other ranks pass a buffer of the same shape."""
        if self.size == 1:
            return Handle((), lambda: x, lambda: None)
        out = x.contiguous().clone() if self.rank == source else torch.empty_like(x, memory_format=torch.contiguous_format)
        work = dist.broadcast(_plain(out), self._global(source), group=self.group, async_op=True)
        received = 0 if self.rank == source else 1
        return self._post(label, "broadcast", received, received * _bytes(out), [work], lambda: out)

    def _global(self, rank: int) -> int:
        assert self.group is not None
        return dist.get_global_rank(self.group, rank)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _plain(x: Tensor) -> Tensor:
    """A view that every backend can send: complex numbers as pairs of real ones."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
