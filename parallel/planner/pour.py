"""Pour light documents into the room that shelves of heavy documents leave, and into shelves of their own."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

from longhaul.parallel.planner.fill import Filled
from longhaul.parallel.planner.problem import Group, Problem, Shelf, Work


def pour(
    problem: Problem, shelves: list[tuple[Filled, int]], light: Sequence[int], rate: Sequence[float], work: Work
) -> tuple[list[Shelf], list[int]]:
    """Best-fit by falling length into the groups and free ranks of the shelves; heights are kept.

    Returns:
        the shelves (empty groups dropped), and the documents that found no room.
    """
    if not light:
        return [filled.groups for filled, _ in shelves], []
    results: list[Shelf] = []
    groups: list[tuple[Group, int]] = []
    room: list[tuple[float, int]] = []
    for filled, height in shelves:
        shelf = filled.groups
        if filled.singles is None:
            shelf += [[problem.start[0], 0, 0, [], -1] for _ in range(filled.free)]
        else:
            for rank in filled.singles:
                kind = problem.single_kind[rank]
                shelf.append([problem.start[kind], 0, kind, [], rank])
        results.append(shelf)
        for group in shelf:
            groups.append((group, height))
    for number, (group, height) in enumerate(groups):
        space = min(problem.capacity[group[2]] - group[1], (height - group[0]) / rate[group[2]])
        if space > 0:
            room.append((space, number))
    room.sort()
    left = []
    for i in light:
        tokens, time = problem.length[i], problem.time[i]
        at = bisect_left(room, (0.97 * tokens, -1))
        work.done += 1
        for position in range(at, min(at + 24, len(room))):
            number = room[position][1]
            group, height = groups[number]
            kind = group[2]
            if group[0] + time[kind] <= height and group[1] + tokens <= problem.capacity[kind]:
                group[0] += time[kind]
                group[1] += tokens
                group[3].append(i)
                del room[position]
                space = min(problem.capacity[kind] - group[1], (height - group[0]) / rate[kind])
                if space > 0:
                    insort(room, (space, number))
                break
        else:
            left.append(i)
    return [[group for group in shelf if group[3]] for shelf in results], left


def squeeze(problem: Problem, shelves: list[Shelf], documents: Sequence[int], work: Work) -> list[int]:
    """Put documents where they lengthen a micro-batch least; returns those for which no group has memory."""
    left = []
    heights = [max(group[0] for group in shelf) for shelf in shelves]
    for i in documents:
        tokens, time = problem.length[i], problem.time[i]
        best, least = None, 0
        for number, shelf in enumerate(shelves):
            for group in shelf:
                kind = group[2]
                if group[1] + tokens > problem.capacity[kind]:
                    continue
                longer = group[0] + time[kind] - heights[number]
                if best is None or longer < least:
                    best, least = (number, group), longer
        work.done += 1 + sum(map(len, shelves)) // 8
        if best is None:
            left.append(i)
            continue
        number, group = best
        group[0] += time[group[2]]
        group[1] += tokens
        group[3].append(i)
        heights[number] = max(heights[number], group[0])
    return left


def level(
    problem: Problem, documents: Sequence[int], shelves: int, kinds: Sequence[tuple[int, int]], work: Work
) -> list[Shelf] | None:
    """Longest processing time first over `shelves` micro-batches of the same groups, memory-capped; None if it does not
    fit.

    Args:
        problem: the step's problem.
        documents: positions by falling length.
        shelves: number of micro-batches.
        kinds: kind and first rank of each group of a micro-batch.
        work: counts the placements.
    """
    groups: list[Group] = [[problem.start[kind], 0, kind, [], first] for _ in range(shelves) for kind, first in kinds]
    heap = [(group[0], number) for number, group in enumerate(groups)]
    heapq.heapify(heap)
    for i in documents:
        work.done += 1
        tokens, full = problem.length[i], []
        while heap:
            time, number = heapq.heappop(heap)
            group = groups[number]
            if group[1] + tokens <= problem.capacity[group[2]]:
                break
            full.append((time, number))
        else:
            return None
        group[0] += problem.time[i][group[2]]
        group[1] += tokens
        group[3].append(i)
        heapq.heappush(heap, (group[0], number))
        for item in full:
            heapq.heappush(heap, item)
        work.done += len(full) // 4
    # Groups of like time side by side: the sum over micro-batches of the longest is least. A block holds one group a
    # micro-batch.
    by_block: dict[tuple[int, int], list[Group]] = {}
    for number, group in enumerate(groups):
        by_block.setdefault(
            kinds[number % len(kinds)] if not problem.even else (group[2], number % len(kinds)), []
        ).append(group)
    if problem.even:
        ranked = sorted(groups, key=lambda group: (-group[0], group[3][:1]))
        rows = [ranked[row * len(kinds) : (row + 1) * len(kinds)] for row in range(shelves)]
    else:
        columns = [sorted(column, key=lambda group: (-group[0], group[3][:1])) for column in by_block.values()]
        rows = [[column[row] for column in columns] for row in range(shelves)]
    filled = [[group for group in row if group[3]] for row in rows]
    return [row for row in filled if row]
