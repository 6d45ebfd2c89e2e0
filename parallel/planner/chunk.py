"""Sort and cut: runs of like documents become micro-batches, each planned by dual approximation (bisection on its
makespan).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from longhaul.parallel.planner.fill import Filled, lowest
from longhaul.parallel.planner.problem import Problem, Shelf, Work


def cut(lengths: list[int], runs: int) -> list[tuple[int, int]]:
    """Cut sorted lengths into at most `runs` consecutive runs whose largest token sum is least."""
    before = [0, *accumulate(lengths)]
    low, high = max(max(lengths), before[-1] // runs), before[-1]
    best = [(0, len(lengths))]
    while low <= high:
        middle = (low + high) // 2
        bounds: list[tuple[int, int]] = []
        start = 0
        while start < len(lengths) and len(bounds) <= runs:
            end = bisect_right(before, before[start] + middle) - 1
            bounds.append((start, end))
            start = end
        if start == len(lengths) and len(bounds) <= runs:
            best, high = bounds, middle - 1
        else:
            low = middle + 1
    return best


def floors(problem: Problem, bounds: list[tuple[int, int]]) -> list[int]:
    """Least time of each chunk, bias included."""
    areas = [sum(problem.area[start:end]) // problem.power for start, end in bounds]
    return [problem.bias + max(area, problem.least[start]) for area, (start, _) in zip(areas, bounds, strict=True)]


def dual(problem: Problem, documents: Sequence[int], work: Work) -> Filled | None:
    """Shortest micro-batch that holds all documents; None if none was found.

    A taller micro-batch is not always easier to fill: documents move to smaller groups, whose memory binds. So the
    bisection starts from several heights, and again with groups of at least a degree, in which memory is shared.
    """
    floor = max(sum(problem.area[i] for i in documents) // problem.power, problem.least[documents[0]])
    best = None
    for least in sorted(set(problem.degree)):
        for percent in (130, 180, 260, 400):
            upper = floor * percent // 100
            if best is not None and upper >= best.time:
                upper = best.time - 1
            filled = lowest(problem, documents, work, upper, least=least)
            if filled is not None:
                best = filled
                break
            if best is not None and upper == best.time - 1:
                break
    return best


def chunked(problem: Problem, work: Work, tries: int = 5, below: int | None = None) -> list[Shelf] | None:
    """Best plan over `tries` numbers of micro-batches; None if no chunk can be planned or none can beat `below`."""
    best, least = None, below
    for runs in range(problem.shelves, problem.shelves + tries):
        if work.spent:
            break
        bounds = cut(problem.length, runs)
        work.done += len(bounds)
        times = floors(problem, bounds)
        shelves: list[Shelf] = []
        for number, (start, end) in enumerate(bounds):
            if least is not None and sum(times) >= least:
                break
            filled = dual(problem, range(start, end), work)
            if filled is None:
                break
            times[number] = problem.bias + filled.time
            shelves.append(filled.groups)
        if len(shelves) == len(bounds):
            total = problem.total(shelves)
            if least is None or total < least:
                best, least = shelves, total
    return best
