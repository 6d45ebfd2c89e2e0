"""Rows and columns of the published mixed-integer program.

Legend: `q` buckets of like documents, `m` micro-batches, `p` slots (virtual groups) of a micro-batch.

    minimise sum_m (bias z_m + C_m)
    start_p use_mp + sum_q A_qmp time_qp <= C_m      every slot           (time)
    sum_q A_qmp tokens_q <= capacity_p use_mp        every slot           (memory)
    sum_p degree_p use_mp <= ranks z_m               every micro-batch    (ranks)
    sum_mp A_qmp = count_q                           every bucket         (each document once)

`A` and `use` are integers; buckets are represented by their longest document and cut by dynamic programming.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from longhaul.parallel.planner.bounds import Rows
from longhaul.parallel.planner.problem import NEVER, Problem, Shelf

TICK = 1000.0  # the program's unit of time is a millisecond, so that its coefficients stay close to 1


def bucket_cuts(lengths: Sequence[int], buckets: int) -> list[int]:
    """Bounds of `buckets` runs of falling lengths that add the fewest tokens when rounded up to each run's longest."""
    count = len(lengths)
    if buckets >= count:
        return list(range(count + 1))
    values = np.asarray(lengths, np.int64)
    before = np.concatenate([[0], np.cumsum(values)])
    best = np.arange(count + 1) * values[0] - before  # one bucket
    back = np.zeros((buckets, count + 1), np.int64)
    for bucket in range(1, buckets):
        latest = best.copy()
        for end in range(1, count + 1):
            starts = np.arange(end)
            added = best[:end] + values[:end] * (end - starts) - (before[end] - before[:end])
            back[bucket, end] = int(np.argmin(added))
            latest[end] = added[back[bucket, end]]
        best = latest
    cuts, end = [count], count
    for bucket in range(buckets - 1, 0, -1):
        end = int(back[bucket, end])
        cuts.append(end)
    return sorted({0, *cuts})


class Program:
    """The mixed-integer program of some documents and a number of micro-batches."""

    def __init__(
        self, problem: Problem, documents: Sequence[int], micro_batches: int, buckets: int, least_degree: int
    ) -> None:
        self.problem, self.documents, self.M = problem, list(documents), micro_batches
        cuts = bucket_cuts([problem.length[i] for i in documents], buckets)
        self.members = [self.documents[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        self.bucketed = len(self.members) < len({problem.length[i] for i in self.documents})
        self.slots: list[tuple[int, int]] = []  # kind and first rank
        for kind, entry in enumerate(problem.kinds):
            if entry.degree >= least_degree:
                self.slots += [(kind, first) for first in entry.firsts]
        self.build()

    def build(self) -> None:
        problem, M = self.problem, self.M
        heads = [members[0] for members in self.members]
        counts = np.asarray([len(members) for members in self.members], np.float64)
        kinds = np.asarray([kind for kind, _ in self.slots])
        Q, P = len(heads), len(self.slots)
        self.use = np.arange(M * P).reshape(M, P)
        self.z, self.c = M * P + np.arange(M), M * P + M + np.arange(M)
        self.a = M * P + 2 * M + np.arange(Q * M * P).reshape(Q, M, P)
        self.columns = int(self.a.max()) + 1
        time = problem.table[heads][:, kinds] / TICK  # [Q, P]
        never = problem.table[heads][:, kinds] >= NEVER
        tokens = np.asarray([problem.length[i] for i in heads], np.float64)
        start = np.asarray(problem.start, np.float64)[kinds] / TICK
        capacity = np.asarray(problem.capacity, np.float64)[kinds]
        degree = np.asarray(problem.degree, np.float64)[kinds]
        rows = Rows()
        slot = np.arange(M * P).reshape(M, P)
        every = np.broadcast_to(slot, (Q, M, P))
        rows.add(every, self.a, np.broadcast_to(np.where(never, 0.0, time)[:, None], (Q, M, P)))
        rows.add(slot, self.use, np.broadcast_to(start, (M, P)))
        rows.add(slot, np.broadcast_to(self.c[:, None], (M, P)), -1.0)
        rows.close(np.zeros(M * P))
        rows.add(every, self.a, np.broadcast_to(tokens[:, None, None], (Q, M, P)))
        rows.add(slot, self.use, np.broadcast_to(-capacity, (M, P)))
        rows.close(np.zeros(M * P))
        if problem.even:
            rows.add(np.repeat(np.arange(M), P), self.use, np.tile(degree, M))
            rows.add(np.arange(M), self.z, -float(problem.cluster.ranks))
            rows.close(np.zeros(M))
        else:  # blocks are named, so every rank is in at most one of them
            for rank in range(problem.cluster.ranks):
                covers = [
                    p for p, (kind, first) in enumerate(self.slots) if first <= rank < first + problem.degree[kind]
                ]
                rows.add(np.repeat(np.arange(M), len(covers)), self.use[:, covers], 1.0)
                rows.add(np.arange(M), self.z, -1.0)
                rows.close(np.zeros(M))
        rows.add(np.repeat(np.arange(Q), M * P), self.a, -1.0)
        rows.close(-counts)
        alike = [
            p for p in range(P - 1) if problem.even and kinds[p] == kinds[p + 1]
        ]  # any of them would do: use them in order
        if alike:
            order = np.arange(M * len(alike)).reshape(M, len(alike))
            rows.add(order, self.use[:, [p + 1 for p in alike]], 1.0)
            rows.add(order, self.use[:, alike], -1.0)
            rows.close(np.zeros(M * len(alike)))
        if M > 1:
            rows.add(np.arange(M - 1), self.c[1:], 1.0)
            rows.add(np.arange(M - 1), self.c[:-1], -1.0)
            rows.close(np.zeros(M - 1))
        self.rows = rows
        self.cost = np.zeros(self.columns)
        self.cost[self.z], self.cost[self.c] = problem.bias / TICK, 1.0
        self.upper = np.ones(self.columns)
        self.upper[self.c] = np.inf
        self.upper[self.a] = np.where(never, 0.0, counts[:, None])[:, None, :]
        self.integer = np.ones(self.columns, np.int64)
        self.integer[self.c] = 0

    def start_from(self, shelves: Sequence[Shelf]) -> np.ndarray | None:
        """Values of the variables for a plan of as many micro-batches (even clusters), longest micro-batch first."""
        if not self.problem.even or len(shelves) > self.M:
            return None
        values = np.zeros(self.columns)
        bucket = {i: q for q, members in enumerate(self.members) for i in members}
        heads = [members[0] for members in self.members]
        filled = []
        for shelf in shelves:
            taken: dict[int, int] = {}
            entries, longest = [], 0
            for group in shelf:
                slots = [p for p, (kind, _) in enumerate(self.slots) if kind == group[2]]
                number = taken.get(group[2], 0)
                if number >= len(slots):
                    return None
                taken[group[2]] = number + 1
                time = self.problem.start[group[2]] + sum(
                    self.problem.time[heads[bucket[i]]][group[2]] for i in group[3]
                )
                longest = max(longest, time)
                entries.append((slots[number], group[3]))
            filled.append((longest, entries))
        for m, (longest, entries) in enumerate(sorted(filled, key=lambda item: -item[0])):
            values[self.z[m]], values[self.c[m]] = 1.0, longest / TICK
            for p, members in entries:
                values[self.use[m, p]] = 1.0
                for i in members:
                    values[self.a[bucket[i], m, p]] += 1.0
        return values

    def shelves_from(self, values: np.ndarray) -> list[Shelf]:
        """Plan of a solution: each bucket's documents handed out in order."""
        problem = self.problem
        waiting = [list(members) for members in self.members]
        shelves: list[Shelf] = []
        for m in range(self.M):
            shelf: Shelf = []
            for p, (kind, first) in enumerate(self.slots):
                taken: list[int] = []
                for q, left in enumerate(waiting):
                    number = round(values[self.a[q, m, p]])
                    taken += left[:number]
                    del left[:number]
                if taken:
                    time = problem.start[kind] + sum(problem.time[i][kind] for i in taken)
                    tokens = sum(problem.length[i] for i in taken)
                    shelf.append([time, tokens, kind, taken, -1 if problem.even else first])
            if shelf:
                shelves.append(shelf)
        return shelves
