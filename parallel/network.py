"""What the links of a group cost, measured at start by a short probe.

A message of `s` bytes is there after `latency + s / bandwidth`. Both are medians over a few rounds, software included, so
they hold for what this program does and not for the cable alone. All ranks get the same numbers: each measures, one
all-gather shares what was found, every rank reduces the same table, and the result is rounded to two digits.

Legend: P ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from longhaul.models.errors import UserError
from longhaul.models.ops.affine import AffineMap, LogScale

from .comm import Comm

SMALL = 8  # bytes of a message that is all latency
LARGE = 1 << 18  # bytes of a message that is mostly bandwidth, here and on networks of GB/s after a few of them
ROUNDS = 4  # messages in a row that one time is taken over
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
        message: one point-to-point message to a neighbour, and the next one only after it (a hop of a chain).
        collective: one all-gather on the whole group; `bytes_per_s` of what a rank receives.
        update: one map applied to one state here, by bytes of the state.
    """

    ranks: int
    message: Link
    collective: Link
    update: Link = Link(0.0)

    @classmethod
    def even(cls, ranks: int, latency_s: float, bytes_per_s: float) -> Network:
        """A network by the book: an all-gather has `ceil(log2 P)` latencies, and arithmetic is free."""
        steps = math.ceil(math.log2(ranks)) if ranks > 1 else 0
        return cls(ranks, Link(latency_s, bytes_per_s), Link(steps * latency_s, bytes_per_s))


def probe(comm: Comm, device: torch.device | str = "cpu", repeats: int = 5) -> Network:
    """Measure the links of a group; collective, and the same answer on every rank.

    A chain of messages passes every link, so a message counts the mean of the ranks; a collective waits for the slowest.
    Traffic is counted under the label `probe`.

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
        ],
        dtype=torch.float64,
        device=device,
    )
    table = comm.all_gather(found, LABEL).wait().tolist()  # [P, 6]
    mean = [sum(column) / comm.size for column in zip(*table)]
    worst = [max(column) for column in zip(*table)]
    return Network(
        ranks=comm.size,
        message=_link(mean[0], mean[1]),
        collective=_link(worst[2], worst[3] / (comm.size - 1)),
        update=_link(worst[4], worst[5]),
    )


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
        per_byte = max(0.0, slow - fast) / max(1, large - small)
        return max(0.0, fast - small * per_byte), per_byte

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
