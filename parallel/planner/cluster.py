"""What a plan may use: ranks, their memory and speed, and the links between them.

Groups are *buddy-aligned blocks*: `degree` is a power of two and the first rank is a multiple of it, so that a rank
belongs to at most `log2(ranks) + 1` groups. Blocks of one degree that cost the same are one `Kind`; on an even cluster
there is one kind a degree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from longhaul.models.errors import UserError

SPEED_STEPS = 1000  # speeds are integers in thousandths: shares and cut points are exact


@dataclass(frozen=True)
class Link:
    """A level of the network: groups whose block lies inside `span` aligned ranks use it.

    Attributes:
        span: aligned ranks that this level joins.
        bandwidth: bytes per second a rank can receive.
        latency: seconds a message takes.
    """

    span: int
    bandwidth: float
    latency: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """Ranks of one job.

    Attributes:
        ranks: number of ranks.
        memory: bytes a rank may spend on model states and activations.
        links: levels of the network, by rising span; the last one joins all ranks.
        all_to_all: measured all-to-all bandwidth (bytes per second) by degree; degrees that are absent use `links`.
        speeds: relative speed of each rank (1.0 is the rank that the cost model was fitted on); empty: all 1.
        link_speeds: relative link speed of each rank; a group is as fast as its slowest link; empty: all 1.
    """

    ranks: int
    memory: float
    links: tuple[Link, ...]
    all_to_all: Mapping[int, float] = field(default_factory=dict)
    speeds: tuple[float, ...] = ()
    link_speeds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise UserError(f"A cluster needs at least one rank, not {self.ranks}: set `ranks`.")
        if not self.memory or self.memory <= 0:
            raise UserError(
                f"The cluster states no memory (memory={self.memory}): set `memory` to the bytes a rank may use."
            )
        if not self.links or self.links[-1].span < self.ranks:
            raise UserError(
                f"The links join at most {self.links[-1].span if self.links else 0} of {self.ranks} ranks: "
                "add a link whose span is the number of ranks."
            )
        if any(link.bandwidth <= 0 or link.latency < 0 for link in self.links):
            raise UserError("A link needs a bandwidth above 0 and a latency of at least 0.")
        for name in ("speeds", "link_speeds"):
            values = getattr(self, name)
            if values and len(values) != self.ranks:
                raise UserError(f"`{name}` has {len(values)} values for {self.ranks} ranks: give one a rank, or none.")
            if any(round(value * SPEED_STEPS) < 1 for value in values):
                raise UserError(
                    f"`{name}` has a value of {min(values)}: leave a rank that does no work out of the cluster."
                )

    @property
    def degrees(self) -> tuple[int, ...]:
        """Powers of two up to the number of ranks."""
        return tuple(1 << power for power in range(self.ranks.bit_length()))

    def speed(self, rank: int) -> int:
        """Speed of a rank in thousandths."""
        return round(self.speeds[rank] * SPEED_STEPS) if self.speeds else SPEED_STEPS

    def link_speed(self, first: int, degree: int) -> float:
        """Slowest relative link of a block."""
        return min(self.link_speeds[first : first + degree]) if self.link_speeds else 1.0

    def link(self, degree: int) -> Link:
        """The level that an aligned block of `degree` ranks lives in."""
        for link in self.links:
            if link.span >= degree and link.span % degree == 0:
                return link
        return self.links[-1]

    def exchange_bandwidth(self, degree: int) -> float:
        """All-to-all bandwidth of a rank, bytes per second."""
        return self.all_to_all.get(degree, self.link(degree).bandwidth)

    def part(self, first: int, ranks: int) -> Cluster:
        """The cluster of `ranks` consecutive ranks (a pod)."""
        links = tuple(link for link in self.links if link.span < ranks)
        top = next(link for link in self.links if link.span >= ranks)
        return Cluster(
            ranks,
            self.memory,
            (*links, Link(ranks, top.bandwidth, top.latency)),
            self.all_to_all,
            self.speeds[first : first + ranks],
            self.link_speeds[first : first + ranks],
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Cluster:
        """Read a cluster file's contents (numbers, lists and maps only)."""
        known = {"ranks", "memory", "links", "all_to_all", "speeds", "link_speeds"}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(
                f"The cluster file has an unknown key {unknown[0]!r}: the keys are {', '.join(sorted(known))}."
            )
        for name, remedy in (
            ("ranks", "the number of ranks"),
            ("memory", "the bytes a rank may use"),
            ("links", "the levels of the network, each with span, bandwidth and latency"),
        ):
            if values.get(name) is None:
                raise UserError(f"The cluster file states no {name}: add `{name}`, {remedy}.")
        links = tuple(
            Link(int(link["span"]), float(link["bandwidth"]), float(link.get("latency", 0.0)))
            for link in values["links"]
        )
        return cls(
            int(values["ranks"]),
            float(values["memory"]),
            links,
            {int(degree): float(speed) for degree, speed in (values.get("all_to_all") or {}).items()},
            tuple(float(speed) for speed in values.get("speeds") or ()),
            tuple(float(speed) for speed in values.get("link_speeds") or ()),
        )


@dataclass(frozen=True)
class Kind:
    """Blocks of one degree that cost the same, with one way to share tokens among their ranks.

    Attributes:
        degree: ranks of a block.
        firsts: first rank of each such block.
        shares: integer share of each rank: rank `r` holds `shares[r] / sum(shares)` of the tokens.
        slowdown: largest of `share / speed`, relative to equal shares on ranks of speed 1 (1.0 on an even cluster).
        power: summed speed of the block, thousandths.
        link_speed: slowest relative link of the block.
    """

    degree: int
    firsts: tuple[int, ...]
    shares: tuple[int, ...]
    slowdown: float
    power: int
    link_speed: float

    def capacity(self, tokens: int) -> int:
        """Tokens the block holds when a rank holds at most `tokens`."""
        return tokens * sum(self.shares) // max(self.shares)

    def cuts(self, tokens: int) -> tuple[int, ...]:
        """Cut points of a packed stream, `degree + 1` offsets; no rank gets more than its share rounded up."""
        total, before, cuts = sum(self.shares), 0, [0]
        for share in self.shares:
            before += share
            cuts.append(tokens * before // total)
        return tuple(cuts)


def kinds_of(cluster: Cluster, max_degree: int | None = None) -> tuple[Kind, ...]:
    """All kinds of block, by rising degree, then rising power (slow blocks are tried first).

    A block whose ranks differ in speed is offered three times: tokens shared by speed (fastest, but the fast ranks'
    memory binds), equally (most memory), and half-way.
    """
    kinds: list[Kind] = []
    for degree in cluster.degrees:
        if max_degree is not None and degree > max_degree:
            break
        classes: dict[tuple[tuple[int, ...], float], list[int]] = {}
        for first in range(0, cluster.ranks - degree + 1, degree):
            speeds = tuple(cluster.speed(rank) for rank in range(first, first + degree))
            classes.setdefault((speeds, cluster.link_speed(first, degree)), []).append(first)
        found = []
        for (speeds, link_speed), firsts in classes.items():
            even = max(speeds) == min(speeds)
            mean = sum(speeds) // degree
            ways = [speeds] if even else [speeds, tuple((speed + mean) // 2 for speed in speeds), (mean,) * degree]
            for shares in ways:
                if even:
                    shares = (1,) * degree
                worst = max(share / speed for share, speed in zip(shares, speeds, strict=True))
                slowdown = worst * degree * SPEED_STEPS / sum(shares)
                found.append(Kind(degree, tuple(firsts), shares, slowdown, sum(speeds), link_speed))
        kinds += sorted(found, key=lambda kind: (kind.power, -kind.slowdown, kind.firsts))
    return tuple(kinds)
