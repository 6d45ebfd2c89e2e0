"""What each exchange of affine maps should cost: the seconds that local work does not hide.

`python -m longhaul.parallel.exchange.cost` prints the crossover tables of docs/engines.md.

Formulas (h hops that wait for each other, m bytes of a state, n of a packed map, L seconds of local work; `t(s) = a + s / b`
a message of all ranks at once, `t1(s) = a1 + s / b1` a hop of a chain, `c(s) = a' + s / b'` an all-gather that brings s bytes,
`u(s)` one map applied, `g` what a message more in a stream takes, s = m / K):

    all_gather    max(0, c((P - 1) N n) - L) + P N u(m)
    all_scan      max((K - 1) (g + u(s)), h t1(s) + (h - 1) u(s) + (K - 1) max(s / b1, g + u(s)) - L) + u(s)
    ring          the same, with K = 1
    log_scan      max(0, s t(n) + 2 s (u(m) + u(n - m)) - L) + 2 u(m),      s = ceil(log2(h + 1))
    hierarchical  max(0, c1((g - 1) n) - L) + g u(m) + all_scan on h' hops between nodes, of m / g bytes, L = 0
                  + c1((g - 1) m / g) + u(m)

So it is where ranks forward beside their local work (`Network.forwards`); what the last rank does for each block itself is
not hidden. Where they do not forward, a rank in the middle of a chain
passes the state on when it waits for it: local work hides the first hop only, and a block is asked for after the one
before:

    all_scan      max(0, t1(s) - L) + (h + K - 2) (t1(s) + u(s)) + u(s)
    log_scan      max(0, t(n) - L) + (s - 1) t(n) + 2 s (u(m) + u(n - m))

Where the end of the chain is wanted, the point-to-point forms broadcast it: `c(m)` more.

Legend: P ranks, N parts of a rank, g ranks of a node, K blocks of a state.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from longhaul.models.ops.affine import AffineMap
from longhaul.parallel.network import Network

from .base import Chain
from .runs import make_runs

NO_GAIN = 0.03  # more blocks are not worth less than this share of the time
FLAT = ("all_gather", "ring", "all_scan", "log_scan")


class Workload(NamedTuple):
    """One exchange.

    Attributes:
        parts: N.
        hops: h, the longest way of a state from rank to rank; documents that end shorten it.
        state_bytes: m.
        linear_bytes: n - m, what M takes on the wire; 0 where every rank knows it.
        width: of the value axis, along which a state is cut.
        local_s: L.
        want_end: whether all ranks want what leaves the chain.
    """

    ranks: int
    hops: int
    state_bytes: int
    linear_bytes: int = 0
    parts: int = 1
    width: int = 1
    local_s: float = 0.0
    want_end: bool = False


class Levels(NamedTuple):
    """Nodes of `inside.ranks` ranks: the links inside one, and between ranks of one index in theirs."""

    inside: Network
    across: Network


class Estimate(NamedTuple):
    """Exposed seconds, and the blocks of a state they hold for (0: not cut)."""

    seconds: float
    blocks: int = 0


def workload(maps: AffineMap, chain: Chain, ranks: int, reverse: bool, want_end: bool, local_s: float = 0.0) -> Workload:
    """The exchange of `maps` [N, *state_shape] on a chain, alike on all ranks."""
    offset, linear = maps.offset, maps.linear.pack(maps.num_maps)
    return Workload(
        ranks=ranks,
        hops=hops(chain, reverse),
        state_bytes=offset[0].numel() * offset.element_size(),
        # Packed as numbers of the offset's type.
        linear_bytes=0 if linear is None else _reals(linear[0]) * offset.real.element_size(),
        parts=maps.num_maps,
        width=offset.shape[-1],
        local_s=local_s,
        want_end=want_end,
    )


def _reals(x: Tensor) -> int:
    return x.numel() * (2 if x.is_complex() else 1)


def hops(chain: Chain, reverse: bool = False) -> int:
    """The longest way of a state from rank to rank, in messages that wait for each other."""
    longest = depth = 0
    runs = make_runs(chain, reverse)
    for k, (run, after) in enumerate(zip(runs, runs[1:])):
        depth = 1 if k == 0 or run.closed else depth + 1
        if after.reads:
            longest = max(longest, depth)
    return longest


def estimate(name: str, work: Workload, network: Network, levels: Levels | None = None) -> Estimate:
    """Exposed seconds of one exchange by name; `hierarchical` needs `levels`."""
    end = network.collective.seconds(work.state_bytes) if work.want_end else 0.0
    if name == "all_gather":
        return Estimate(_all_gather(work, network))
    if name == "ring":
        return Estimate(_pipeline(work, network, 1) + end)
    if name == "all_scan":
        found = [Estimate(_pipeline(work, network, k) + end, k) for k in block_counts(work.width)]
        enough = (1 + NO_GAIN) * min(each.seconds for each in found)
        return next(each for each in found if each.seconds <= enough)
    if name == "log_scan":
        return Estimate(_log_scan(work, network) + end)
    assert name == "hierarchical" and levels is not None, name
    return _hierarchical(work, levels)


def estimates(work: Workload, network: Network, levels: Levels | None = None) -> dict[str, Estimate]:
    """Of all exchanges that `auto` chooses from, by name."""
    names = FLAT if levels is None else (*FLAT, "hierarchical")
    return {name: estimate(name, work, network, levels) for name in names}


def best(found: dict[str, Estimate]) -> str:
    """The least exposed time; of equals the first."""
    return min(found, key=lambda name: found[name].seconds)


def block_counts(width: int) -> list[int]:
    """Powers of two, up to the value width."""
    return [2**k for k in range(max(1, width).bit_length())]


def _all_gather(work: Workload, network: Network) -> float:
    maps = network.ranks * work.parts
    received = (network.ranks - 1) * work.parts * (work.state_bytes + work.linear_bytes)
    arrival = network.collective.seconds(received)
    return max(0.0, arrival - work.local_s) + maps * network.update.seconds(work.state_bytes)


def _pipeline(work: Workload, network: Network, blocks: int) -> float:
    if not work.hops:
        return 0.0
    size = work.state_bytes / blocks
    hop, update = network.hop.seconds(size), network.update.seconds(size)
    if not network.forwards:
        # A block is asked for after the one before, so each takes a whole hop, and the last follows K - 1 others.
        return max(0.0, hop - work.local_s) + (work.hops + blocks - 2) * (hop + update) + update
    handling = network.gap_s + update
    there = work.hops * hop + (work.hops - 1) * update + (blocks - 1) * max(size / network.hop.bytes_per_s, handling)
    return max((blocks - 1) * handling, there - work.local_s) + update


def _log_scan(work: Workload, network: Network) -> float:
    steps = math.ceil(math.log2(work.hops + 1))
    if not steps:
        return 0.0
    step, update = network.message.seconds(work.state_bytes + work.linear_bytes), network.update.seconds(work.state_bytes)
    product = network.update.seconds(work.linear_bytes) if work.linear_bytes else 0.0
    compose = 2 * (update + product)
    if not network.forwards:
        return max(0.0, step - work.local_s) + (steps - 1) * step + steps * compose
    return max(0.0, steps * (step + compose) - work.local_s) + 2 * update


def _hierarchical(work: Workload, levels: Levels) -> Estimate:
    size = levels.inside.ranks
    node = _all_gather(work._replace(hops=min(work.hops, size - 1)), levels.inside)
    slice_ = work._replace(
        hops=min(work.hops, levels.across.ranks - 1),
        state_bytes=math.ceil(work.state_bytes / size),
        width=max(1, work.width // size),
        local_s=0.0,
        want_end=False,
    )
    across = estimate("all_scan", slice_, levels.across)
    slices = (2 if work.want_end else 1) * (size - 1) * slice_.state_bytes
    gather = levels.inside.collective.seconds(slices) + levels.inside.update.seconds(work.state_bytes)
    return Estimate(node + across.seconds + gather, across.blocks)


# Latency and bandwidth, and whether ranks forward beside their local work.
LINKS = {
    "25 GB/s, 10 us": (10e-6, 25e9, False),
    "1.2 GB/s, 30 us": (30e-6, 1.2e9, True),
    "100 MB/s, 200 us": (200e-6, 1e8, True),
}
SIZES = {"Mamba-2, 64 heads of 128 x 64": (64, 128, 64, 1), "delta rule, 16 heads of 128 x 128": (16, 128, 128, 128 * 128)}
RANKS = (2, 4, 8, 16, 64, 256)


def crossover() -> Iterator[str]:
    """The crossover tables, as lines of Markdown."""
    for size, (heads, key, value, linear) in SIZES.items():
        state, extra = 4 * heads * key * value, 4 * heads * linear
        yield f"{size}: a state of {state / 2**20:.3g} MiB, a linear part of {extra / 2**20:.3g} MiB (fp32)"
        yield ""
        yield "| link | local work | " + " | ".join(f"P = {ranks}" for ranks in RANKS) + " |"
        yield "| --- | --- |" + " --- |" * len(RANKS)
        for (link, numbers), local in itertools.product(LINKS.items(), (0.0, 1e-3, 10e-3)):
            work = Workload(1, 0, state, extra, width=value, local_s=local)
            cells = (_cell(work._replace(ranks=P, hops=P - 1), Network.even(P, *numbers)) for P in RANKS)
            yield f"| {link} | {1e3 * local:g} ms | " + " | ".join(cells) + " |"
        yield ""


def _cell(work: Workload, network: Network) -> str:
    found = estimates(work, network)
    name = best(found)
    blocks = f" ({found[name].blocks})" if found[name].blocks else ""
    return f"{name}{blocks} {1e3 * found[name].seconds:.3g} ms"


def main() -> None:
    """Print the tables."""
    print("\n".join(crossover()).rstrip())


if __name__ == "__main__":
    main()
