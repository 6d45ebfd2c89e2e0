"""The exchange that should cost least here, chosen from measured numbers.

Links are measured once by a probe (`longhaul.parallel.network`), by `prepare` or at the first exchange that must send; local
work, behind which messages hide, is measured on the first exchanges of each kind, and agreed by all ranks. From both the
cost model (`cost.py`) picks, once for each kind of map, size of state, direction, way of documents and tokens a rank (to three
binary digits). All ranks pick alike: they choose from the same numbers.

Which exchange runs may so differ from run to run, and with it the order of additions: name an exchange, or give the numbers,
where two runs must agree to the last bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longhaul.models.errors import UserError
from longhaul.models.ops.affine import AffineMap
from longhaul.models.ops.recurrence import Pending
from longhaul.parallel.comm import Comm
from longhaul.parallel.network import LABEL, Network, probe

from .all_gather import AllGather
from .all_scan import AllScan
from .base import Chain, Exchange, crosses, refuse_rounding
from .cost import Estimate, Levels, Workload, best, estimates, workload
from .hierarchical import Hierarchical
from .log_scan import LogScan
from .ring import Ring
from .walk import Walk

MEASURED = 3  # exchanges of a kind whose local work is timed; the shortest counts, as the first ones warm up


class Choice(NamedTuple):
    """A decision: what for, what each exchange was expected to cost, and which one it is."""

    work: Workload
    estimates: dict[str, Estimate]
    name: str


class Auto(Exchange):
    """Picks an exchange; what it receives is what that one receives, and a few bytes of the probe.

    Args:
        intra: the ranks of this node, and `inter`: the ranks with this one's index in their nodes. With them,
            `hierarchical` (all-gather inside, all-scan across) is a candidate, if there are nodes of several ranks.
        latency_s, bytes_per_s: of a message, everywhere; given together, nothing is probed and `hierarchical` is out.
        local_s_per_token: seconds of local work a token; None: measured.
    """

    name = "auto"

    def __init__(
        self,
        comm: Comm,
        payload_dtype: str = "float32",
        intra: Comm | None = None,
        inter: Comm | None = None,
        latency_s: float | None = None,
        bytes_per_s: float | None = None,
        local_s_per_token: float | None = None,
    ) -> None:
        refuse_rounding(self.name, payload_dtype)
        if (latency_s is None) != (bytes_per_s is None):
            raise UserError(
                f"Exchange 'auto' got latency_s {latency_s} and bytes_per_s {bytes_per_s}: give both, or none to measure."
            )
        if (intra is None) != (inter is None):
            raise UserError("Exchange 'auto' got one of the groups intra and inter: give both, or none.")
        self.comm, self.intra, self.inter = comm, intra, inter
        self.network: Network | None = None
        self.levels: Levels | None = None
        if latency_s is not None and bytes_per_s is not None:
            self.network = Network.even(comm.size, latency_s, bytes_per_s, forwards=comm.tagged)
        self.local_s_per_token = local_s_per_token
        self.choices: dict[tuple[Any, ...], Choice] = {}
        self._clocks: dict[tuple[object, ...], _Clock] = {}
        self._rates: dict[tuple[object, ...], float] = {}  # seconds of local work a token, agreed
        self._exchanges: dict[tuple[str, int], Exchange] = {}

    def start(
        self,
        maps: AffineMap,
        chain: Chain,
        initial: Tensor | None = None,
        reverse: bool = False,
        want_end: bool = False,
    ) -> Pending:
        if self.comm.size == 1 or not (crosses(chain) or want_end):
            return Walk(self.comm).start(maps, chain, initial, reverse, want_end)  # which sends nothing
        self.prepare(maps.offset.device)
        assert self.network is not None, "just measured"
        tokens = _bucket(max(link.length for link in chain) * maps.num_maps)
        kind = (type(maps.linear).__name__, tuple(maps.offset.shape[1:]), maps.offset.dtype, reverse)
        rate = self._rate(kind, maps.offset.device)
        choice = self._choose(kind, maps, chain, reverse, want_end, tokens, rate)
        blocks = choice.estimates[choice.name].blocks
        pending = self._exchange(choice.name, blocks).start(maps, chain, initial, reverse, want_end)
        if rate is not None:
            return pending
        mine = sum(link.length for link in chain if link.owner == self.comm.rank)
        return _Timed(pending, self._clocks[kind], mine, maps.offset.device)

    def describe(self) -> str:
        """What was measured and decided, for people."""
        if self.network is None:
            return "auto: nothing was sent yet"
        message, hop, gather = self.network.message, self.network.hop, self.network.collective
        lines = [
            f"auto on {self.comm.size} ranks: a message takes {1e6 * message.latency_s:.3g} us and "
            f"{message.bytes_per_s:.2g} B/s, a hop of a chain {1e6 * hop.latency_s:.3g} us and {hop.bytes_per_s:.2g} B/s, each "
            f"message after it {1e6 * self.network.gap_s:.3g} us, "
            f"an all-gather {1e6 * gather.latency_s:.3g} us and {gather.bytes_per_s:.2g} B/s"
        ]
        for (kind, shape, dtype, reverse, tokens, *_, timed), choice in self.choices.items():
            if not timed and (kind, shape, dtype, reverse) in self._rates:
                continue  # only while local work was being timed
            costs = ", ".join(f"{name} {1e3 * found.seconds:.3g}" for name, found in choice.estimates.items())
            beside = f"beside {1e3 * choice.work.local_s:.3g} ms of local work" if timed else "(local work is not timed yet)"
            lines.append(
                f"  {kind} {shape} {'backward' if reverse else 'forward'}, {tokens} tokens, {choice.work.hops} hops {beside}: "
                f"{choice.name} (exposed ms: {costs})"
            )
        return "\n".join(lines)

    def prepare(self, device: torch.device) -> None:
        """Probe the links, once; on all ranks at once."""
        if self.network is not None or self.comm.size == 1:
            return
        self.network = probe(self.comm, device)
        if self.intra is not None and self.inter is not None and min(self.intra.size, self.inter.size) > 1:
            inside, across = probe(self.intra, device), probe(self.inter, device)
            self.levels = Levels(self._agree(inside, device), self._agree(across, device))

    def _agree(self, network: Network, device: torch.device) -> Network:
        """Each node measured its own links: all go by those of rank 0's."""
        mine = torch.tensor(network.numbers(), dtype=torch.float64, device=device)
        return network.with_numbers(self.comm.broadcast(mine, 0, LABEL).wait().tolist())

    def _rate(self, kind: tuple[object, ...], device: torch.device) -> float | None:
        """Seconds of local work a token, alike on all ranks; None while it is being measured."""
        if self.local_s_per_token is not None:
            return self.local_s_per_token
        if kind in self._rates:
            return self._rates[kind]
        clock = self._clocks.setdefault(kind, _Clock())
        clock.started += 1
        if clock.started <= MEASURED:
            return None
        mine = torch.tensor([clock.seconds_per_token if clock.timed else -1.0], dtype=torch.float64, device=device)
        told = [rate for (rate,) in self.comm.all_gather(mine, LABEL).wait().tolist() if rate >= 0]
        self._rates[kind] = sum(told) / len(told) if told else 0.0
        return self._rates[kind]

    def _choose(
        self,
        kind: tuple[object, ...],
        maps: AffineMap,
        chain: Chain,
        reverse: bool,
        want_end: bool,
        tokens: int,
        rate: float | None,
    ) -> Choice:
        in_order = [link.owner for link in chain] == list(range(self.comm.size))
        work = workload(maps, chain, self.comm.size, reverse, want_end)
        key = (*kind, tokens, work.hops, want_end, in_order, rate is not None)
        if key not in self.choices:
            assert self.network is not None, "the links are measured first"
            work = work._replace(local_s=(rate or 0.0) * tokens)
            found = estimates(work, self.network, self.levels if in_order else None)
            self.choices[key] = Choice(work, found, best(found))
        return self.choices[key]

    def _exchange(self, name: str, blocks: int) -> Exchange:
        if (name, blocks) not in self._exchanges:
            self._exchanges[name, blocks] = self._make(name, blocks)
        return self._exchanges[name, blocks]

    def _make(self, name: str, blocks: int) -> Exchange:
        if name == "all_scan":
            return AllScan(self.comm, blocks=blocks)
        if name == "hierarchical":
            assert self.intra is not None and self.inter is not None
            return Hierarchical(self.comm, AllGather(self.intra), AllScan(self.inter, blocks=blocks))
        flat: dict[str, Callable[[Comm], Exchange]] = {"all_gather": AllGather, "ring": Ring, "log_scan": LogScan}
        return flat[name](self.comm)


def _bucket(tokens: int) -> int:
    """Lengths that are chosen for alike: three binary digits."""
    drop = max(0, tokens.bit_length() - 3)
    return tokens >> drop << drop


class _Clock:
    """Local work between `start` and `wait` of one kind of exchange, on this rank."""

    def __init__(self) -> None:
        self.started = self.timed = 0
        self.seconds_per_token = float("inf")

    def add(self, seconds: float, tokens: int) -> None:
        if tokens:
            self.timed += 1
            self.seconds_per_token = min(self.seconds_per_token, seconds / tokens)


class _Timed:
    """A pending exchange that times the local work beside it."""

    def __init__(self, pending: Pending, clock: _Clock, tokens: int, device: torch.device) -> None:
        self.pending, self.clock, self.tokens, self.device = pending, clock, tokens, device
        self.start = self._now()

    def wait(self) -> tuple[Tensor, Tensor | None]:
        self.clock.add(self._now() - self.start, self.tokens)
        return self.pending.wait()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
