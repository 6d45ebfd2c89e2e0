"""The best plan of a step of a few documents, by dynamic programming over subsets (even clusters, summed objective).

For every candidate makespan `c` at once: `ranks(S, c)` is the fewest ranks on which the subset `S` runs in one micro-
batch within `c`, the least over the groups `B` that hold the first document of `S` of `degree(B, c) + ranks(S - B, c)`.
The shortest `c` with `ranks(S, c) <= ranks of the cluster` is the makespan of `S`; a second program over subsets forms
the micro-batches.
"""

from __future__ import annotations

import numpy as np

from longhaul.parallel.planner.problem import Problem, Shelf, Work

MOST = 7  # documents


def _subsets(members: int, first: int) -> list[int]:
    """Subsets of `members` that hold the bit `first`."""
    rest = members & ~first
    found, part = [], rest
    while True:
        found.append(part | first)
        if part == 0:
            return found
        part = (part - 1) & rest


def exact(problem: Problem, work: Work) -> list[Shelf]:
    """Best plan of at most `MOST` documents."""
    count, kinds = len(problem.length), len(problem.degree)
    size = 1 << count
    work.done += 3**count
    bits = (np.arange(size)[:, None] >> np.arange(count)) & 1  # [subsets, documents]
    tokens = bits @ np.asarray(problem.length, np.int64)
    fits = tokens[:, None] <= np.asarray(problem.capacity, np.int64)  # [subsets, K]
    held = np.minimum(problem.table, 1 << 50)
    time = bits @ held + np.asarray(problem.start, np.int64)  # [subsets, K]
    heights = np.unique(time[fits & (tokens > 0)[:, None]])
    never = problem.cluster.ranks + 1
    degree = np.full((size, len(heights)), never, np.int64)  # fewest ranks of one group, [subsets, heights]
    for kind in range(kinds - 1, -1, -1):
        possible = fits[:, kind, None] & (time[:, kind, None] <= heights)
        degree = np.where(possible, problem.degree[kind], degree)
    ranks = np.full((size, len(heights)), never, np.int64)
    ranks[0] = 0
    for subset in range(1, size):
        for group in _subsets(subset, subset & -subset):
            np.minimum(ranks[subset], degree[group] + ranks[subset ^ group], out=ranks[subset])
    enough = ranks <= problem.cluster.ranks
    shortest = np.where(enough.any(axis=1), enough.argmax(axis=1), -1).tolist()
    best, choice = [0] + [1 << 60] * (size - 1), [0] * size
    for subset in range(1, size):
        for batch in _subsets(subset, subset & -subset):
            if shortest[batch] >= 0:
                total = best[subset ^ batch] + problem.bias + int(heights[shortest[batch]])
                if total < best[subset]:
                    best[subset], choice[subset] = total, batch
    shelves, left = [], size - 1
    while left:
        batch = choice[left]
        shelves.append(_groups(problem, batch, shortest[batch], degree, ranks, time, heights))
        left ^= batch
    return shelves


def _groups(
    problem: Problem,
    batch: int,
    height: int,
    degree: np.ndarray,
    ranks: np.ndarray,
    time: np.ndarray,
    heights: np.ndarray,
) -> Shelf:
    """Groups of a micro-batch, traced back through the program."""
    shelf: Shelf = []
    while batch:
        for group in _subsets(batch, batch & -batch):
            if degree[group, height] + ranks[batch ^ group, height] == ranks[batch, height]:
                break
        kind = problem.degree.index(int(degree[group, height]))
        members = [i for i in range(len(problem.length)) if group >> i & 1]
        shelf.append([int(time[group, kind]), sum(problem.length[i] for i in members), kind, members, -1])
        batch ^= group
    return shelf
