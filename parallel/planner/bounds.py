"""Lower bounds on the time of a step, valid for any plan under the cost model. Proofs: docs/planner.md.

`area_bound` needs a sum. `configuration_bound` is a linear program over *classes* of micro-batches by makespan; it sees
that a long micro-batch filled with short documents runs out of memory before it runs out of time, and that a document
is in one group.

Legend: `Q` items (single documents, or buckets of short ones), `R` classes, `K` kinds of block.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from longhaul.models.errors import UserError
from longhaul.parallel.planner.problem import NEVER, Problem


def area_bound(problem: Problem) -> int:
    """Least power-time of every document over the cluster's power, plus one bias for each micro-batch that memory
    forces.
    """
    return -(-sum(problem.area) // problem.power) + problem.shelves * problem.bias


def pods_bound(problem: Problem, blocks: list[range]) -> int:
    """Bound on a step whose pods do not wait for each other: the slowest pod is no faster than the mean, weighted by
    power.
    """
    ranks = problem.cluster.ranks
    least = min(sum(map(problem.cluster.speed, block)) / len(block) for block in blocks) * ranks / problem.power
    biases = int(problem.bias * min(1.0, least) * problem.total_tokens / (ranks * problem.tokens))
    return max(sum(problem.area) // problem.power + biases, max(problem.least) + problem.bias)


@dataclass
class Rows:
    """Rows `sum(value * variable) <= limit` of a sparse program, collected in blocks."""

    row: list[np.ndarray] = field(default_factory=list)
    column: list[np.ndarray] = field(default_factory=list)
    value: list[np.ndarray] = field(default_factory=list)
    limits: list[np.ndarray] = field(default_factory=list)
    count: int = 0

    def add(self, row: np.ndarray, column: np.ndarray, value: np.ndarray | float) -> None:
        """Entries of rows numbered from the present block's first."""
        self.row.append(np.asarray(row).ravel() + self.count)
        self.column.append(np.asarray(column).ravel())
        self.value.append(np.broadcast_to(np.asarray(value, np.float64), np.shape(row)).ravel())

    def close(self, limits: np.ndarray | list[float]) -> None:
        """End the present block: one limit a row."""
        self.limits.append(np.asarray(limits, np.float64))
        self.count += len(self.limits[-1])

    def matrix(self, columns: int) -> Any:
        from scipy.sparse import csr_matrix

        entries = (np.concatenate(self.value), (np.concatenate(self.row), np.concatenate(self.column)))
        return csr_matrix(entries, shape=(self.count, columns))


def items_of(problem: Problem, singles: int, buckets: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The longest documents one by one, the others as buckets whose tokens can be divided.

    Returns:
        tokens [Q], least time of the whole item [Q, K] (`inf` where no document of it fits), shortest document's time
        [Q, K], and which items are single [Q].
    """
    table = np.where(problem.table < NEVER, problem.table, np.inf)
    length = np.asarray(problem.length, np.float64)
    count = min(singles, len(length))
    groups = [np.asarray([i]) for i in range(count)]
    groups += [group for group in np.array_split(np.arange(count, len(length)), buckets) if len(group)]
    tokens = np.asarray([length[group].sum() for group in groups])
    # A bucket's time is its tokens times the least time a token of any of its documents: no document is underrated.
    whole = np.stack([(table[group] / length[group, None]).min(axis=0) for group in groups]) * tokens[:, None]
    shortest = np.stack([table[group].min(axis=0) for group in groups])
    return tokens, whole, shortest, np.arange(len(groups)) < count


def configuration_bound(problem: Problem, upper: int, classes: int = 24, singles: int = 100, buckets: int = 8) -> int:
    """Degree-aggregated linear program over classes of micro-batches.

    Args:
        problem: the step's problem.
        upper: time of any plan; no micro-batch of a better plan is longer.
        classes: makespan intervals.
        singles: documents treated one by one.
        buckets: groups of the other documents.

    Returns:
        microseconds; at least `area_bound`. Made safe against the solver's tolerance by weak duality.
    """
    try:
        from scipy.optimize import linprog
    except ImportError:
        raise UserError(
            "The configuration bound needs a solver and none is installed: pip install 'longhaul[planner]', or use "
            "`area_bound`, which needs none."
        ) from None

    simple = area_bound(problem)
    tokens, whole, shortest, single = items_of(problem, singles, buckets)
    start = np.asarray(problem.start, np.float64)
    degree, power = np.asarray(problem.degree, np.float64), np.asarray(problem.powers, np.float64)
    capacity = np.asarray(problem.capacity, np.float64)
    ranks = float(problem.cluster.ranks)
    most = float(max(upper - problem.bias * problem.shelves, max(problem.least)))
    top = min(most, 1.5 * max(float(max(problem.least)), simple / problem.shelves))
    edges = np.unique(np.concatenate([[0.0], np.geomspace(0.2 * simple / problem.shelves, top, classes), [most]]))
    low, high = edges[:-1], edges[1:]
    R, K, Q = len(low), len(degree), len(tokens)
    blocks = np.asarray([len(kind.firsts) for kind in problem.kinds], np.float64)

    # Variables: y[R] micro-batches, t[R] their makespans, n[R, K] groups, u[R, K] their makespans, x[Q, R, K] shares of
    # items.
    y, t = np.arange(R), R + np.arange(R)
    n = 2 * R + np.arange(R * K).reshape(R, K)
    u = n + R * K
    allowed = shortest[:, None, :] + start <= high[None, :, None]  # [Q, R, K]
    q, r, k = np.nonzero(allowed)
    x = 2 * R + 2 * R * K + np.arange(len(q))
    columns = 2 * R + 2 * R * K + len(q)
    rk, rows = r * K + k, Rows()
    all_r, all_rk = np.arange(R), np.arange(R * K).reshape(R, K)
    zeros_r, zeros_rk = np.zeros(R), np.zeros(R * K)

    for sign, edge in ((1.0, high), (-1.0, low)):  # low y <= t <= high y, and the same for n and u
        rows.add(all_r, t, sign)
        rows.add(all_r, y, -sign * edge)
        rows.close(zeros_r)
        rows.add(all_rk, u, sign)
        rows.add(all_rk, n, -sign * np.repeat(edge, K).reshape(R, K))
        rows.close(zeros_rk)
    rows.add(np.repeat(all_r, K), n, np.tile(degree, R).reshape(R, K).ravel())  # ranks
    rows.add(all_r, y, -ranks)
    rows.close(zeros_r)
    rows.add(np.repeat(all_r, K), u, np.tile(power, R))  # power-time
    rows.add(all_r, t, -float(problem.power))
    rows.close(zeros_r)
    rows.add(rk, x, whole[q, k])  # time inside the groups
    rows.add(all_rk, n, np.tile(start, R).reshape(R, K))
    rows.add(all_rk, u, -1.0)
    rows.close(zeros_rk)
    rows.add(rk, x, tokens[q])  # memory inside the groups
    rows.add(all_rk, n, -np.tile(capacity, R).reshape(R, K))
    rows.close(zeros_rk)
    for share in (_halves, _thirds):  # how many large documents fit one group, by time and by memory
        by_time = np.where(single[q], share(whole[q, k] / np.maximum(high[r] - start[k], 1e-9)), 0.0)
        by_memory = np.where(single[q], share(tokens[q] / capacity[k]), 0.0)
        for value in (by_time, by_memory):
            kept = value > 0
            rows.add(rk[kept], x[kept], value[kept])
            rows.add(all_rk, n, -1.0)
            rows.close(zeros_rk)
    kept = single[q]  # a document is in one group of one micro-batch
    rows.add((q * R + r)[kept], x[kept], 1.0)
    rows.add(np.arange(int(single.sum()) * R), np.tile(y, int(single.sum())), -1.0)
    rows.close(np.zeros(int(single.sum()) * R))
    rows.add(np.zeros(R, np.int64), y, -1.0)  # micro-batches
    rows.close([-float(problem.shelves)])
    uneven = np.flatnonzero(blocks * degree < ranks - degree + 1)  # kinds that not all ranks can be
    for kind in uneven:
        rows.add(all_r, n[:, kind], 1.0)
        rows.add(all_r, y, -blocks[kind])
        rows.close(zeros_r)
    rows.add(q, x, -1.0)  # every item whole: x sums to at least 1
    rows.close(-np.ones(Q))

    matrix, limits = rows.matrix(columns), np.concatenate(rows.limits)
    cost = np.zeros(columns)
    cost[y], cost[t] = problem.bias, 1.0
    found = linprog(cost, A_ub=matrix, b_ub=limits, method="highs-ds")
    if found.status != 0:
        return simple
    # Weak duality: for any multipliers m <= 0, cost x >= limits m + sum(min(0, cost - matrix^T m) * largest x).
    multipliers = np.minimum(found.ineqlin.marginals, 0.0)
    reduced = cost - matrix.T @ multipliers
    batches = upper / max(problem.bias, 1)
    largest = np.ones(columns)
    largest[y], largest[t] = batches, float(upper)
    largest[n], largest[u] = batches * ranks, float(upper) * ranks
    safe = float(limits @ multipliers + np.minimum(reduced, 0.0) @ largest)
    return max(simple, int(safe - 1.0))


def _halves(ratio: np.ndarray) -> np.ndarray:
    return np.where(ratio > 0.5, 1.0, 0.0)


def _thirds(ratio: np.ndarray) -> np.ndarray:
    return np.where(ratio > 2.0 / 3.0, 1.0, np.where(ratio > 1.0 / 3.0, 0.5, 0.0))
