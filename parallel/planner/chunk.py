"""Sort and cut: runs of like documents become micro-batches, each planned by dual approximation (bisection on its
makespan).
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

from longhaul.parallel.planner.fill import lowest
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


def floor(problem: Problem, bounds: list[tuple[int, int]]) -> int:
    """No plan of these chunks is faster."""
    total = 0
    for start, end in bounds:
        area = sum(problem.area[start:end]) // problem.power
        total += problem.bias + max(area, problem.least[start])
    return total


def chunked(problem: Problem, work: Work, tries: int = 5, below: int | None = None) -> list[Shelf] | None:
    """Best plan over `tries` numbers of micro-batches; None if no chunk can be planned or none can beat `below`."""
    best, least = None, below
    for runs in range(problem.shelves, problem.shelves + tries):
        if work.spent:
            break
        bounds = cut(problem.length, runs)
        work.done += len(bounds)
        if least is not None and floor(problem, bounds) >= least:
            continue
        shelves = []
        for start, end in bounds:
            documents = range(start, end)
            upper = 4 * max(sum(problem.area[start:end]) // problem.power, problem.least[start])
            filled = lowest(problem, documents, work, upper)
            if filled is None:
                break
            shelves.append(filled.groups)
        else:
            total = problem.total(shelves)
            if least is None or total < least:
                best, least = shelves, total
    return best
