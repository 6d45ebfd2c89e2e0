"""The planning problem in integers: documents by falling length, kinds of block, and what each document costs on each.

Legend: `n` documents, `K` kinds. Times are integer microseconds; a *group* is the list `[time, tokens, kind, documents,
first]`, where documents are positions in the sorted order and `first` is the first rank of the block, or -1 while any
block will do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from longhaul.models.errors import UserError
from longhaul.parallel.planner.cluster import Cluster, kinds_of
from longhaul.parallel.planner.cost import CostModel

NEVER = 1 << 60  # time of a document that a kind of block cannot hold

Group = list  # [time, tokens, kind, documents, first]
Shelf = list  # groups that run side by side: one micro-batch


class Work:
    """Work done so far, in placements of a document; a limit in work gives the same plan on any machine."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.done = 0

    @property
    def spent(self) -> bool:
        return self.done >= self.limit


class Problem:
    """Documents and costs of one step.

    Attributes:
        order: `order[i]` is the caller's index of the `i`-th longest document.
        length: tokens by falling length. [n]
        time: microseconds document `i` adds to a group of kind `k`, or `NEVER`. [n][K]
        start: microseconds a group of kind `k` costs when empty. [K]
        area: least power-microseconds (microseconds x summed speed in thousandths) of each document. [n]
        power: summed speed of all ranks, thousandths.
        shelves: least number of micro-batches, by memory.
    """

    def __init__(self, lengths: Sequence[int], cluster: Cluster, model: CostModel) -> None:
        self.cluster, self.model = cluster, model
        values = np.asarray(list(lengths), dtype=np.int64)
        if values.size == 0 or values.min() < 1:
            raise UserError(
                "A step needs at least one document, and every document at least one token: drop empty documents."
            )
        self.order: list[int] = np.argsort(-values, kind="stable").tolist()
        sorted_lengths = values[self.order]
        self.length: list[int] = sorted_lengths.tolist()
        self.tokens = tokens = model.tokens_per_rank(cluster)
        self.kinds = kinds_of(cluster, model.max_degree)
        self.degree = [kind.degree for kind in self.kinds]
        self.capacity = [kind.capacity(tokens) for kind in self.kinds]
        if self.length[0] > max(self.capacity):
            raise UserError(
                f"A document of {self.length[0]} tokens does not fit the {max(self.capacity)} tokens that the largest "
                f"group of {max(self.degree)} ranks holds: set `train.stream_tokens` to stream it in chunks, or add "
                "ranks or memory."
            )
        fits = sorted_lengths[:, None] <= np.asarray(self.capacity, np.int64)  # [n, K]
        starts = [[model.group_time(cluster, kind, layers) for kind in self.kinds] for layers in model.parts]
        tables = [
            np.stack([model.document_time(sorted_lengths, cluster, kind, layers) for kind in self.kinds], axis=1)
            for layers in model.parts
        ]
        # The layers between barriers add up to the whole exactly, so that a bound on their sum bounds the split
        # objective too.
        self.start = [sum(column) for column in zip(*starts, strict=True)]
        self.table = np.where(fits, sum(tables), NEVER)  # [n, K]
        self.parts = (
            [(start, table.tolist()) for start, table in zip(starts, tables, strict=True)] if len(tables) > 1 else []
        )
        self.time: list[list[int]] = self.table.tolist()
        # Whether every document alone is no slower in a larger group; slow links may make it slower.
        alone = np.minimum(self.table + np.asarray(self.start, np.int64), NEVER)
        self.falling = bool((alone[:, 1:] <= alone[:, :-1]).all())
        self.powers = [kind.power for kind in self.kinds]
        self.power = sum(cluster.speed(rank) for rank in range(cluster.ranks))
        feasible = self.table < NEVER
        areas = np.where(feasible, np.where(feasible, self.table, 0) * np.asarray(self.powers, np.int64), NEVER)
        self.area: list[int] = areas.min(axis=1).tolist()
        self.total_tokens = sum(self.length)
        self.shelves = max(1, -(-self.total_tokens // (cluster.ranks * tokens)))
        self.bias = model.bias_time()
        self.even = len({kind.degree for kind in self.kinds}) == len(self.kinds)
        singles = [k for k, kind in enumerate(self.kinds) if kind.degree == 1]
        self.single_kind = {first: k for k in singles for first in self.kinds[k].firsts}
        self.least = (
            np.where(feasible, self.table + np.asarray(self.start, np.int64), NEVER).min(axis=1).tolist()
        )  # shortest time of a micro-batch that holds the document

    def shelf_time(self, shelf: Shelf) -> int:
        """Time of a micro-batch without the bias, by the objective."""
        if not self.parts:
            return max(group[0] for group in shelf)
        return sum(
            max(start[group[2]] + sum(time[i][group[2]] for i in group[3]) for group in shelf)
            for start, time in self.parts
        )

    def total(self, shelves: Sequence[Shelf]) -> int:
        """Time of a step: micro-batches one after the other."""
        return sum(self.bias + self.shelf_time(shelf) for shelf in shelves)


class Pool:
    """Free ranks of a cluster whose blocks differ: hands out aligned blocks of a kind."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.free = [True] * problem.cluster.ranks

    def take(self, kind: int) -> int:
        """First rank of a free block of this kind, taken; -1 if there is none."""
        degree = self.problem.degree[kind]
        for first in self.problem.kinds[kind].firsts:
            if all(self.free[first : first + degree]):
                self.free[first : first + degree] = [False] * degree
                return first
        return -1

    def singles(self) -> list[int]:
        """Free ranks."""
        return [rank for rank, free in enumerate(self.free) if free]


def place(problem: Problem, shelf: Shelf) -> None:
    """Give every group its block: by falling degree, blocks in a row are aligned and disjoint."""
    if not problem.even:
        return
    first = 0
    for group in sorted(shelf, key=lambda group: (-problem.degree[group[2]], group[3][0])):
        group[4] = first
        first += problem.degree[group[2]]
