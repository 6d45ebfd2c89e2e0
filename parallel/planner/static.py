"""Plans of one degree: what a job without a planner runs, and the yardstick of every other plan."""

from __future__ import annotations

from longhaul.parallel.planner.pour import level
from longhaul.parallel.planner.problem import Problem, Shelf, Work

TRIES = 6  # numbers of micro-batches tried above the least


def smallest_degree(problem: Problem, longest: int) -> int:
    """Smallest degree whose blocks all hold a document of `longest` tokens."""
    for degree in sorted(set(problem.degree)):
        if (
            max(capacity for capacity, other in zip(problem.capacity, problem.degree, strict=True) if other == degree)
            >= longest
        ):
            return degree
    return max(problem.degree)


def blocks(problem: Problem, degree: int) -> list[tuple[int, int]]:
    """Kind and first rank of every block of a degree, tokens shared by speed if the longest document fits so."""
    if problem.even:
        kind = problem.degree.index(degree)
        return [(kind, -1)] * (problem.cluster.ranks // degree)
    found: dict[int, int] = {}
    for kind, entry in enumerate(problem.kinds):
        for first in entry.firsts:
            fits = entry.degree == degree and problem.capacity[kind] >= problem.length[0]
            if fits and (first not in found or entry.slowdown < problem.kinds[found[first]].slowdown):
                found[first] = kind
    return [(kind, first) for first, kind in sorted(found.items())]


def floor(problem: Problem, degree: int) -> int:
    """No plan of this degree is faster."""
    best = [k for k, other in enumerate(problem.degree) if other == degree]
    work = sum(min(time[k] * problem.powers[k] for k in best) for time in problem.time)
    return work // problem.power + problem.shelves * problem.bias


def fixed(problem: Problem, degree: int, work: Work) -> list[Shelf] | None:
    """Every group has this degree; longest documents first to the least loaded group, as few micro-batches as memory
    allows.

    Returns None if a document does not fit a group of this degree.
    """
    kinds = blocks(problem, degree)
    if not kinds or max(problem.capacity[kind] for kind, _ in kinds) < problem.length[0]:
        return None
    documents = range(len(problem.length))
    room = sum(problem.capacity[kind] for kind, _ in kinds)
    least = max(1, -(-problem.total_tokens // room))
    best: list[Shelf] | None = None
    fitting = 0
    for shelves in range(least, least + len(documents) + 1):
        found = level(problem, documents, shelves, kinds, work)
        if found is None:
            continue
        fitting += 1
        if best is None or problem.total(found) < problem.total(best):
            best = found
        if fitting == 2 or shelves >= least + TRIES:
            break
    return best
