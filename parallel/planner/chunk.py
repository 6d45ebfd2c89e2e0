"""Sort and cut: runs of like documents become micro-batches, each planned by dual approximation (bisection on its makespan)."""

from __future__ import annotations

from longhaul.parallel.planner.fill import lowest
from longhaul.parallel.planner.problem import Problem, Shelf, Work


def cut(lengths: list[int], runs: int) -> list[tuple[int, int]] | None:
    """Cut sorted lengths into at most `runs` consecutive runs whose largest token sum is least."""
    low, high = max(lengths), sum(lengths)
    best = None
    while low <= high:
        middle = (low + high) // 2
        bounds, start, total = [], 0, 0
        for position, length in enumerate(lengths):
            if total + length > middle:
                bounds.append((start, position))
                start, total = position, 0
            total += length
        bounds.append((start, len(lengths)))
        if len(bounds) <= runs:
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
        work.done += len(problem.length)
        if bounds is None or (least is not None and floor(problem, bounds) >= least):
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
