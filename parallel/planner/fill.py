"""Fill one micro-batch: place documents, longest first, into groups none of which takes longer than a given time.

This is the inner loop of every candidate: a guess of the height, then first-fit by falling length into the smallest
feasible degree (dual approximation).
"""

from __future__ import annotations

from collections.abc import Sequence

from longhaul.parallel.planner.problem import Group, Pool, Problem, Shelf, Work

LOOSE = 1 << 20  # a ratio that forbids nothing
TIGHT = 1.6


class Filled:
    """A micro-batch that may have room left.

    Attributes:
        groups: its groups.
        left: documents that found no place.
        free: ranks that belong to no group: a number, or the ranks where blocks differ.
        time: longest group.
        loose: a document joined a group at more than `TIGHT` times its least area.
    """

    __slots__ = ("free", "groups", "left", "loose", "singles", "time")

    def __init__(
        self, groups: Shelf, left: list[int], free: int, singles: list[int] | None, time: int, loose: bool = False
    ) -> None:
        self.groups, self.left, self.free, self.singles, self.time = groups, left, free, singles, time
        self.loose = loose


def fill(
    problem: Problem, documents: Sequence[int], height: int, work: Work, ratio: float = LOOSE, least: int = 1
) -> Filled:
    """Place as many documents as fit into one micro-batch of the given height.

    Args:
        problem: the step's problem.
        documents: positions by falling length.
        height: microseconds no group exceeds.
        work: counts the placements.
        ratio: a document joins a larger group than it needs only if that costs at most `ratio` times its least area.
        least: smallest degree of a group.
    """
    times, lengths, areas = problem.time, problem.length, problem.area
    degrees, capacities, start, powers = problem.degree, problem.capacity, problem.start, problem.powers
    count = len(degrees)
    free = problem.cluster.ranks
    pool = None if problem.even else Pool(problem)
    opened: list[list[Group]] = [[] for _ in range(count)]
    closed: Shelf = []
    left: list[int] = []
    if not documents:
        return Filled(closed, left, free, pool.singles() if pool else None, 0)
    last = documents[-1]
    shortest, fewest = times[last], lengths[last]
    latest = num_open = tried = 0
    loose = False
    lowest_kind = next(kind for kind in range(count) if degrees[kind] >= least)
    # Where larger groups are faster, the smallest that fits moves down only, as documents get shorter.
    falling = pool is None and problem.falling
    first_kind = count - 1 if falling else lowest_kind
    for position, i in enumerate(documents):
        tried += 1
        time, tokens, limit = times[i], lengths[i], ratio * areas[i]
        if falling:
            while first_kind > lowest_kind and time[first_kind - 1] + start[first_kind - 1] <= height:
                first_kind -= 1
        needed, done = 0, False
        for kind in range(first_kind, count):
            extra = time[kind]
            room = height - extra
            if room < start[kind]:
                continue
            if not needed:
                needed = degrees[kind]
            groups = opened[kind]
            best = None
            if groups and (degrees[kind] == needed or extra * powers[kind] <= limit):
                space, fullest = capacities[kind] - tokens, -1
                for group in groups:
                    if fullest < group[0] <= room and group[1] <= space:
                        best, fullest = group, group[0]
            if best is not None:
                loose = loose or extra * powers[kind] > TIGHT * areas[i]
                best[0] += extra
                best[1] += tokens
                best[3].append(i)
                if height - best[0] < shortest[kind] or capacities[kind] - best[1] < fewest:
                    groups.remove(best)
                    closed.append(best)
                    num_open -= 1
            elif degrees[kind] == needed and free >= needed:
                first = -1 if pool is None else pool.take(kind)
                if pool is not None and first < 0:
                    continue
                best = [start[kind] + extra, tokens, kind, [i], first]
                free -= needed
                if height - best[0] < shortest[kind] or capacities[kind] - tokens < fewest:
                    closed.append(best)
                else:
                    groups.append(best)
                    num_open += 1
            else:
                continue
            if best[0] > latest:
                latest = best[0]
            done = True
            break
        if not done:
            left.append(i)
        if free == 0 and num_open == 0:
            left.extend(documents[position + 1 :])
            break
    work.done += tried * (1 + count // 64)
    for groups in opened:
        closed += groups
    return Filled(closed, left, free, pool.singles() if pool else None, latest, loose)


def lowest(
    problem: Problem, documents: Sequence[int], work: Work, upper: int, steps: int = 5, least: int = 1
) -> Filled | None:
    """Bisect the height for the shortest micro-batch that holds all documents; None if `upper` is too low."""
    lower = max(max(problem.least[i] for i in documents), sum(problem.area[i] for i in documents) // problem.power)
    best = None
    height = upper
    for _ in range(steps):
        if height < lower or upper - lower < upper >> 10:
            break
        filled = fill(problem, documents, height, work, least=least)
        if filled.left:
            lower = height + 1
        else:
            best = filled
            upper = filled.time - 1
        height = (lower + upper) // 2
    return best
