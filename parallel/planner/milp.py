"""The published formulation as a mixed-integer program on HiGHS: an oracle for small steps, and an offline reference
for large ones.

Legend: `q` buckets of like documents, `m` micro-batches, `p` slots (virtual groups) of a micro-batch.

    minimise sum_m (bias z_m + C_m)
    start_p use_mp + sum_q A_qmp time_qp <= C_m      every slot           (time)
    sum_q A_qmp tokens_q <= capacity_p use_mp        every slot           (memory)
    sum_p degree_p use_mp <= ranks z_m               every micro-batch    (ranks)
    sum_mp A_qmp = count_q                           every bucket         (each document once)

`A` and `use` are integers; buckets are represented by their longest document and cut by dynamic programming.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from longhaul.models.errors import UserError
from longhaul.parallel.planner.bounds import Rows
from longhaul.parallel.planner.problem import NEVER, Problem, Shelf

MISSING = (
    "is not installed: pip install 'longhaul[planner]', or use the planner's own `shelf` candidate, "
    "which needs no solver."
)
TICK = 1000.0  # the program's unit of time is a millisecond, so that its coefficients stay close to 1


@dataclass(frozen=True)
class Exact:
    """What the solver found.

    Attributes:
        shelves: the plan, None if no solution was found within the limit.
        time: microseconds of that plan (real lengths).
        bound: microseconds the solver proved for the program; a bound on the step only if `bucketed` is false.
        bucketed: documents were rounded up to their bucket's longest.
        optimal: the program was solved to the end.
        solver: `highspy` or `scipy`.
    """

    shelves: list[Shelf] | None
    time: int
    bound: int
    bucketed: bool
    optimal: bool
    solver: str


def solver_name() -> str:
    """`highspy` if installed (takes a warm start), else `scipy`; UserError if there is neither."""
    for name in ("highspy", "scipy"):
        if importlib.util.find_spec(name) is not None:
            return name
    raise UserError(f"A solver for `milp` {MISSING}")


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


def milp(
    problem: Problem,
    documents: Sequence[int] | None = None,
    micro_batches: int = 1,
    buckets: int = 16,
    nodes: int = 2000,
    least_degree: int = 1,
    warm: Sequence[Shelf] | None = None,
    solver: str | None = None,
) -> Exact:
    """Solve the published formulation.

    Args:
        problem: the step's problem.
        documents: positions to plan; None: all.
        micro_batches: most micro-batches (the published planner uses 1 and cuts the step first).
        buckets: number of buckets; at least the number of documents: no rounding.
        nodes: work limit in nodes of the search tree, on one thread, so that the answer does not depend on the clock.
        least_degree: smaller groups are left out.
        warm: a plan to start from (`highspy` only; others ignore it).
        solver: `highspy` or `scipy`; None: the first that is installed.
    """
    name = solver or solver_name()
    if importlib.util.find_spec(name) is None:
        raise UserError(f"The solver {name} {MISSING}")
    program = Program(
        problem, range(len(problem.length)) if documents is None else documents, micro_batches, buckets, least_degree
    )
    values, bound, optimal = (_highspy if name == "highspy" else _scipy)(program, nodes, warm)
    bound = int(bound * TICK + 0.5) if np.isfinite(bound) else 0
    if values is None:
        return Exact(None, 0, bound, program.bucketed, False, name)
    shelves = program.shelves_from(values)
    return Exact(shelves, problem.total(shelves), bound, program.bucketed, optimal, name)


def _scipy(program: Program, nodes: int, warm: Sequence[Shelf] | None) -> tuple[np.ndarray | None, float, bool]:
    from scipy.optimize import Bounds, LinearConstraint
    from scipy.optimize import milp as solve

    found = solve(
        program.cost,
        integrality=program.integer,
        bounds=Bounds(np.zeros(program.columns), program.upper),
        constraints=LinearConstraint(
            program.rows.matrix(program.columns), -np.inf, np.concatenate(program.rows.limits)
        ),
        options={"node_limit": nodes, "mip_rel_gap": 1e-7},
    )
    bound = found.mip_dual_bound
    return found.x, float(bound) if bound is not None else 0.0, found.status == 0


def _highspy(program: Program, nodes: int, warm: Sequence[Shelf] | None) -> tuple[np.ndarray | None, float, bool]:
    highspy: Any = importlib.import_module("highspy")
    matrix = program.rows.matrix(program.columns)
    limits = np.concatenate(program.rows.limits)
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = program.columns, len(limits)
    model.col_cost_, model.col_lower_, model.col_upper_ = program.cost, np.zeros(program.columns), program.upper
    model.row_lower_, model.row_upper_ = np.full(len(limits), -highspy.kHighsInf), limits
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_, model.a_matrix_.index_, model.a_matrix_.value_ = matrix.indptr, matrix.indices, matrix.data
    kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
    model.integrality_ = [kinds[int(integer)] for integer in program.integer]
    engine = highspy.Highs()
    for option, value in (
        ("output_flag", False),
        ("threads", 1),
        ("mip_max_nodes", nodes),
        ("mip_rel_gap", 1e-7),
        ("random_seed", 0),
    ):
        engine.setOptionValue(option, value)
    engine.passModel(model)
    values = program.start_from(warm) if warm else None
    if values is not None:
        solution = highspy.HighsSolution()
        solution.col_value = values.tolist()
        engine.setSolution(solution)
    engine.run()
    info = engine.getInfo()
    feasible = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    found = np.asarray(engine.getSolution().col_value) if feasible else None
    return found, float(info.mip_dual_bound), engine.getModelStatus() == highspy.HighsModelStatus.kOptimal


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
