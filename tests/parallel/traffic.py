"""What each exchange should receive, written down apart from the exchanges.

Legend: P ranks, g ranks of a node, n numbers of a packed map, m numbers of a state, K blocks of a state.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from longhaul.models.ops.chain import Link


class Cost(NamedTuple):
    """Messages and float64 numbers received by one rank."""

    messages: int = 0
    numbers: int = 0

    def plus(self, other: "Cost") -> "Cost":
        return Cost(self.messages + other.messages, self.numbers + other.numbers)


class Case(NamedTuple):
    """One exchange, seen from one rank."""

    chain: Sequence[Link]
    rank: int
    reverse: bool
    has_initial: bool
    want_end: bool
    ranks: int
    parts: int
    packed: int  # n
    state: int  # m


def _travel(case: Case) -> list[Link]:
    links = [link for link in case.chain if link.length]
    return links[::-1] if case.reverse else links


def _flows(case: Case, j: int, i: int) -> bool:
    """Whether what leaves link j (in travel order) reaches the entry of link i."""
    links = _travel(case)
    goes_on = all((a if case.reverse else b).enters for a, b in zip(links[j:i], links[j + 1 : i + 1]))
    return goes_on and not any(link.cut for link in links[j + 1 : i])


def end(case: Case) -> Cost:
    """The end of the chain, broadcast by the rank that has it."""
    links = _travel(case)
    told = case.want_end and links and links[-1].owner != case.rank and case.ranks > 1
    return Cost(1, case.state) if told else Cost()


def walk(case: Case, blocks: int = 1) -> Cost:
    """One state, in K messages, for each part whose document comes from a part of another rank."""
    links, total = _travel(case), Cost()
    for k in range(1, len(links)):
        if links[k].owner == case.rank != links[k - 1].owner and _flows(case, k - 1, k):
            total = total.plus(Cost(blocks, case.state))
    return total.plus(end(case))


def all_gather(case: Case) -> Cost:
    """All maps of all other ranks, if any document goes on from one part to the next."""
    links = _travel(case)
    needed = case.want_end or any(_flows(case, k - 1, k) for k in range(1, len(links)))
    return Cost(case.ranks - 1, (case.ranks - 1) * case.parts * case.packed) if needed else Cost()


def log_scan(case: Case) -> Cost:
    """One map from 1, 2, 4, .. runs before, as long as that run's state gets here."""
    links, total = _travel(case), Cost()
    firsts = [k for k, link in enumerate(links) if not k or links[k - 1].owner != link.owner]
    for i, first in enumerate(firsts):
        if links[first].owner == case.rank:
            d = 1
            # The state of run i - d comes out of its last link.
            while d <= i and _flows(case, firsts[i - d + 1] - 1, first):
                if links[firsts[i - d]].owner != case.rank:
                    total = total.plus(Cost(1, case.packed))
                d *= 2
    return total.plus(end(case))


def hierarchical(case: Case, size: int, values: int, inside: str, across: str) -> Cost:
    """Maps inside a node, slices of states across nodes, and the slices gathered inside a node."""
    links = list(case.chain)
    if not case.want_end and not any(_flows(case, k - 1, k) for k in range(1, len(_travel(case)))):
        return Cost()
    node, local = divmod(case.rank, size)
    nodes = [_merge(number, links[start : start + size]) for number, start in enumerate(range(0, len(links), size))]
    own = [link._replace(owner=k) for k, link in enumerate(links[node * size : (node + 1) * size])]
    sub = case._replace(chain=own, rank=local, has_initial=False, want_end=False, ranks=size)
    if inside == "all_gather":
        total = Cost(size - 1, (size - 1) * case.packed)
    else:
        total = log_scan(sub)
        if any(link.length for link in own) and size > 1:
            ends = _travel(sub)[-1].owner
            total = total.plus(Cost() if ends == local else Cost(1, case.packed))
    width = values // size + (local < values % size)
    # A packed map has its state's numbers and those of M; here M has none that depend on the values.
    packed = case.packed - case.state + case.state // values * width
    top = case._replace(chain=nodes, rank=node, ranks=case.ranks // size, packed=packed)
    top = top._replace(state=case.state // values * width)
    total = total.plus({"ring": walk, "all_gather": all_gather, "log_scan": log_scan}[across](top))
    order = [link.owner for link in _travel(top)]
    at = order.index(node) if node in order else None
    reads = at is not None and (_flows(top, at - 1, at) if at else case.has_initial and (case.reverse or nodes[node].enters))
    slices = 2 if case.want_end else int(reads)
    padded = case.state // values * math.ceil(values / size)
    return total.plus(Cost(size - 1, slices * (size - 1) * padded) if slices else Cost())


def _merge(number: int, links: Sequence[Link]) -> Link:
    full = [link for link in links if link.length]
    length = sum(link.length for link in full)
    return Link(number, 0, length, length, any(link.cut for link in full), not full or full[0].enters)
