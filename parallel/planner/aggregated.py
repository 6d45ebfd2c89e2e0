"""A lower bound on one micro-batch: an integer program that counts documents and groups, and names neither."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from longhaul.parallel.planner.bounds import Rows
from longhaul.parallel.planner.milp import solver_name
from longhaul.parallel.planner.problem import NEVER, Problem
from longhaul.parallel.planner.program import TICK, bucket_cuts


def aggregated_bound(
    problem: Problem, documents: Sequence[int], buckets: int = 16, nodes: int = 200, steps: int = 9
) -> int:
    """No group plan of these documents *in one micro-batch* is shorter (microseconds, without the bias).

    Counts documents by bucket and degree and groups by degree, with documents rounded down, and bisects the makespan: a
    makespan for which the integer program needs more ranks than there are is impossible.
    """
    solver_name()
    from scipy.optimize import Bounds, LinearConstraint
    from scipy.optimize import milp as solve

    lengths = [problem.length[i] for i in documents]
    cuts = bucket_cuts(lengths, buckets)
    shortest = [documents[b - 1] for b in cuts[1:]]
    counts = np.diff(np.asarray(cuts)).astype(np.float64)
    table = problem.table[shortest]
    tokens = np.asarray([problem.length[i] for i in shortest], np.float64)
    degree, Q, K = np.asarray(problem.degree, np.float64), len(counts), len(problem.degree)
    n, x = np.arange(K), K + np.arange(Q * K).reshape(Q, K)
    area = sum(problem.area[i] for i in documents) // problem.power
    low = max(area, max(problem.least[i] for i in documents))
    high = 4 * low

    def possible(height: int) -> bool:
        rows = Rows()
        kinds = np.broadcast_to(np.arange(K), (Q, K))
        rows.add(kinds, x, np.where(table < NEVER, table, 0) / TICK)
        rows.add(np.arange(K), n, -(height - np.asarray(problem.start, np.float64)) / TICK)
        rows.close(np.zeros(K))
        rows.add(kinds, x, np.broadcast_to(tokens[:, None], (Q, K)))
        rows.add(np.arange(K), n, -np.asarray(problem.capacity, np.float64))
        rows.close(np.zeros(K))
        rows.add(np.broadcast_to(np.arange(Q)[:, None], (Q, K)), x, -1.0)
        rows.close(-counts)
        upper = np.concatenate(
            [[len(kind.firsts) for kind in problem.kinds], np.where(table <= height, counts[:, None], 0.0).ravel()]
        )
        cost = np.concatenate([degree, np.zeros(Q * K)])
        found = solve(
            cost,
            integrality=np.ones(len(cost)),
            bounds=Bounds(np.zeros(len(cost)), upper),
            constraints=LinearConstraint(rows.matrix(len(cost)), -np.inf, np.concatenate(rows.limits)),
            options={"node_limit": nodes},
        )
        if found.status == 2:
            return False
        bound = found.mip_dual_bound
        return bound is None or bound <= problem.cluster.ranks + 1e-6

    for _ in range(steps):
        if high <= low:
            break
        middle = (low + high) // 2
        if possible(middle):
            high = middle
        else:
            low = middle + 1
    return low
