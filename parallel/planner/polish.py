"""Local search on a plan: regroup a micro-batch, and move documents of its longest group to where there is room."""

from __future__ import annotations

from longhaul.parallel.planner.fill import lowest
from longhaul.parallel.planner.problem import Group, Problem, Shelf, Work


def regroup(problem: Problem, shelves: list[Shelf], work: Work) -> bool:
    """Plan each micro-batch's documents again and keep what is shorter. Returns whether anything changed."""
    changed = False
    for number, shelf in enumerate(shelves):
        if work.spent:
            break
        height = max(group[0] for group in shelf)
        documents = sorted(i for group in shelf for i in group[3])
        filled = lowest(problem, documents, work, height - 1)
        if filled is not None:
            shelves[number] = filled.groups
            changed = True
    return changed


def _fits(problem: Problem, group: Group, i: int, height: int) -> bool:
    kind = group[2]
    return group[0] + problem.time[i][kind] <= height and group[1] + problem.length[i] <= problem.capacity[kind]


def _move(problem: Problem, source: Group, target: Group, i: int) -> None:
    for group, sign in ((source, -1), (target, 1)):
        group[0] += sign * problem.time[i][group[2]]
        group[1] += sign * problem.length[i]
    source[3].remove(i)
    target[3].append(i)


def shift(problem: Problem, shelves: list[Shelf], work: Work) -> bool:
    """Lower micro-batches by moving documents of their longest groups to groups, of any micro-batch, that have room.

    Returns whether any micro-batch became shorter.
    """
    heights = [max(group[0] for group in shelf) for shelf in shelves]
    changed = False
    for number, shelf in enumerate(shelves):
        while not work.spent:
            height = heights[number]
            critical = max(shelf, key=lambda group: (group[0], -group[3][0]))
            if len(critical[3]) < 2:
                break
            moved = False
            for i in sorted(critical[3], reverse=True):
                gain = problem.time[i][critical[2]]
                if gain == 0:
                    continue
                best, slack = None, -1
                for other, candidates in enumerate(shelves):
                    limit = heights[other] if other != number else height - 1
                    work.done += len(candidates) // 8
                    for group in candidates:
                        if group is critical or not _fits(problem, group, i, limit):
                            continue
                        room = limit - group[0] - problem.time[i][group[2]]
                        if best is None or room < slack:
                            best, slack = group, room
                if best is not None:
                    _move(problem, critical, best, i)
                    moved = True
                    break
            if not moved:
                break
            heights[number] = max(group[0] for group in shelf)
            changed = changed or heights[number] < height
    return changed


def polish(problem: Problem, shelves: list[Shelf], work: Work, rounds: int = 2) -> None:
    """Alternate both moves until neither helps or the work is spent; works in place and never lengthens the plan."""
    for _ in range(rounds):
        shifted = shift(problem, shelves, work)
        grouped = regroup(problem, shelves, work)
        if not (shifted or grouped) or work.spent:
            break
