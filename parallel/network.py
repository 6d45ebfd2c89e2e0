"""What the links of a group cost, measured at start by a short probe.

A message of `s` bytes is there after `latency + s / bandwidth`. Both are medians over a few rounds, software included, so
they hold for what this program does and not for the cable alone. All ranks get the same numbers: each measures, one
all-gather shares what was found, every rank reduces the same table, and the result is rounded to two digits.

Legend: P ranks.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from longhaul.models.errors import UserError
from longhaul.models.ops.affine import AffineMap, LogScale

from .comm import Comm

SMALL = 8  # bytes of a message that is all latency
LARGE = 1 << 18  # bytes of a message that is mostly bandwidth, here and on networks of GB/s after a few of them
ROUNDS = 4  # messages in a row that one time is taken over
LAPS, STREAM = 2, 8  # times round the group, and messages in a stream, that one time is taken over
ENDLESS = 1e12  # bytes/s of a link whose bandwidth the clock cannot see
LABEL = "probe"


@dataclass(frozen=True)
class Link:
    """A link, or anything else that takes a fixed time and a time per byte.

    Attributes:
        latency_s: seconds of one message without bytes.
        bytes_per_s: what it carries.
    """

    latency_s: float
    bytes_per_s: float = ENDLESS

    def __post_init__(self) -> None:
        if self.latency_s < 0 or not self.bytes_per_s > 0:
            raise UserError(
                f"A link of latency_s {self.latency_s} and bytes_per_s {self.bytes_per_s} cannot be: give a latency of at "
                "least 0 and a bandwidth above 0."
            )

    def seconds(self, size: float) -> float:
        """Of one message of `size` bytes."""
        return self.latency_s + size / self.bytes_per_s


@dataclass(frozen=True)
class Network:
    """What communication on one group costs; a cost model given these numbers is deterministic.

    Attributes:
        ranks: P.
        message: one point-to-point message from every rank to its neighbour, and the next ones only after it.
        hop: one message of a chain, in which one rank after the other sends.
        collective: one all-gather on the whole group; `bytes_per_s` of what a rank receives.
        update: one map applied to one state here, by bytes of the state.
        gap_s: what a message more in a stream of them takes beyond its bytes.
        forwards: whether a rank passes messages on beside its local work, and not only when it waits for them.
    """

    ranks: int
    message: Link
    hop: Link
    collective: Link
    update: Link = Link(0.0)
    gap_s: float = 0.0
    forwards: bool = True

    @classmethod
    def even(cls, ranks: int, latency_s: float, bytes_per_s: float, forwards: bool = True) -> Network:
        """A network by the book: an all-gather has `ceil(log2 P)` latencies, a message more in a stream a third of one, and
        arithmetic is free."""
        steps = math.ceil(math.log2(ranks)) if ranks > 1 else 0
        message, gather = Link(latency_s, bytes_per_s), Link(steps * latency_s, bytes_per_s)
        return cls(ranks, message, message, gather, gap_s=latency_s / 3, forwards=forwards)

    def numbers(self) -> list[float]:
        """All that was measured."""
        links = (self.message, self.hop, self.collective, self.update)
        return [number for link in links for number in (link.latency_s, link.bytes_per_s)] + [self.gap_s]

    def with_numbers(self, numbers: Sequence[float]) -> Network:
        """This network, measured otherwise (see `numbers`)."""
        message, hop, collective, update = (Link(*numbers[k : k + 2]) for k in (0, 2, 4, 6))
        return Network(self.ranks, message, hop, collective, update, numbers[8], self.forwards)


def probe(comm: Comm, device: torch.device | str = "cpu", repeats: int = 5) -> Network:
    """Measure the links of a group; collective, and the same answer on every rank.

    Steps of all ranks at once pass every link, so a message counts the mean of the ranks; a collective waits for the
    slowest; rank 0 times what goes round the group. Traffic is counted under the label `probe`.

    Args:
        repeats: times a measurement is taken; the median counts.
    """
    if comm.size == 1:
        return Network.even(1, 0.0, ENDLESS)
    prober = _Prober(comm, torch.device(device), repeats)
    found = torch.tensor(
        [
            *prober.line(SMALL, LARGE, prober.messages),
            *prober.line(SMALL, max(SMALL, LARGE // (comm.size - 1)), prober.gathers),
            *prober.line(4096, LARGE, prober.updates),
            *prober.chain(),
        ],
        dtype=torch.float64,
        device=device,
    )
    table = comm.all_gather(found, LABEL).wait().tolist()  # [P, 9]
    mean = [sum(column) / comm.size for column in zip(*table)]
    worst = [max(column) for column in zip(*table)]
    latency, per_byte, gap = table[0][6:]
    return Network(
        ranks=comm.size,
        message=_link(max(mean[0], latency), max(mean[1], per_byte)),  # ranks side by side are not faster
        hop=_link(latency, per_byte),
        collective=_link(worst[2], worst[3] / (comm.size - 1)),
        update=_link(worst[4], worst[5]),
        gap_s=_round(gap),
        forwards=comm.tagged and torch.device(device).type == "cpu",
    )


def _line(small: int, large: int, fast: float, slow: float) -> tuple[float, float]:
    """Seconds of size 0, and seconds per byte, from the seconds of two sizes."""
    per_byte = max(0.0, slow - fast) / max(1, large - small)
    return max(0.0, fast - small * per_byte), per_byte


def _link(latency: float, seconds_per_byte: float) -> Link:
    return Link(_round(latency), _round(1 / max(seconds_per_byte, 1 / ENDLESS)))


def _round(value: float) -> float:
    """Two digits: differences that no decision should hang on are not there."""
    return float(f"{value:.1e}")


class _Prober:
    """Times of this rank."""

    def __init__(self, comm: Comm, device: torch.device, repeats: int) -> None:
        self.comm, self.device, self.repeats = comm, device, repeats

    def line(self, small: int, large: int, run: Callable[[int], None]) -> tuple[float, float]:
        """Seconds of size 0, and seconds per byte, of one of the `ROUNDS` that `run(size)` does."""
        run(small)  # connections and buffers
        fast, slow = self.seconds(lambda: run(small)) / ROUNDS, self.seconds(lambda: run(large)) / ROUNDS
        return _line(small, large, fast, slow)

    def chain(self) -> tuple[float, float, float]:
        """Of a hop: seconds of size 0, and seconds per byte; and seconds of each message more in a stream."""
        hops = LAPS * self.comm.size
        self.relay(SMALL, STREAM)  # connections and buffers
        kinds = ((SMALL, 1), (LARGE, 1), (SMALL, STREAM))
        fast, slow, stream = (self.seconds(functools.partial(self.relay, *kind)) for kind in kinds)
        return *_line(SMALL, LARGE, fast / hops, slow / hops), max(0.0, stream - fast) / LAPS / (STREAM - 1)

    def seconds(self, run: Callable[[], None]) -> float:
        times = []
        for _ in range(self.repeats):
            self.comm.all_reduce(torch.zeros(1, device=self.device), LABEL).wait()  # ranks begin together
            self.finish()
            start = time.perf_counter()
            run()
            self.finish()
            times.append(time.perf_counter() - start)
        return median(times)

    def finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def messages(self, size: int) -> None:
        # The next message leaves after one has come, as in a chain.
        for _ in range(ROUNDS):
            self.comm.exchange([self.send(size)], [self.receive(size)], LABEL).wait()

    def relay(self, size: int, count: int) -> None:
        """`count` messages round the group, each passed on when it comes."""
        for _ in range(LAPS):
            arrivals = [self.comm.exchange([], [self.receive(size)], LABEL) for _ in range(count)]
            sends = [self.comm.exchange([self.send(size)], [], LABEL) for _ in arrivals if self.comm.rank == 0]
            for handle in arrivals:
                handle.wait()
                if self.comm.rank > 0:
                    sends.append(self.comm.exchange([self.send(size)], [], LABEL))
            for handle in sends:
                handle.wait()

    def gathers(self, size: int) -> None:
        for _ in range(ROUNDS):
            self.comm.all_gather(self.buffer(size), LABEL).wait()

    def updates(self, size: int) -> None:
        state = torch.ones(1, 1, 1, max(1, size // 4), device=self.device)
        maps = AffineMap(state, LogScale(torch.zeros(1, 1, device=self.device)))
        for _ in range(ROUNDS):
            maps.select([0]).apply(state)

    def buffer(self, size: int) -> torch.Tensor:
        return torch.zeros(max(1, size // 4), device=self.device)

    def send(self, size: int) -> tuple[int, torch.Tensor]:
        return (self.comm.rank + 1) % self.comm.size, self.buffer(size)

    def receive(self, size: int) -> tuple[int, torch.Tensor]:
        return (self.comm.rank - 1) % self.comm.size, self.buffer(size)
