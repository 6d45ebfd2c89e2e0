"""The published formulation (`program.py`) on HiGHS: an oracle for small steps, and an offline reference for large ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from longhaul.models.errors import UserError
from longhaul.parallel.planner.problem import Problem, Shelf
from longhaul.parallel.planner.program import TICK, Program

MISSING = (
    "is not installed: pip install 'longhaul[planner]', or use the planner's own `shelf` candidate, "
    "which needs no solver."
)


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
