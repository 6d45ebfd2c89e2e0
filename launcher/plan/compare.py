"""A plan beside what a job without a planner runs, and beside a solver's answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longhaul.parallel.planner import Cluster, CostModel, Plan
from longhaul.parallel.planner.bounds import configuration_bound
from longhaul.parallel.planner.cost import MICROSECOND
from longhaul.parallel.planner.milp import milp, solver_name
from longhaul.parallel.planner.plan import candidates
from longhaul.parallel.planner.problem import Problem, Work
from longhaul.parallel.planner.static import fixed, smallest_degree

UNLIMITED = 1 << 60
MOST_EXACT = 24  # documents of a step that the published program is tried on


@dataclass(frozen=True)
class Static:
    """Steps of one degree: seconds by degree, and the degree that holds the longest document the job may meet."""

    seconds: dict[int, float]
    fixed: int

    @property
    def best(self) -> int:
        return min(self.seconds, key=lambda degree: self.seconds[degree])


@dataclass(frozen=True)
class Solved:
    """What a solver adds.

    Attributes:
        solver: its name.
        bound: seconds no plan can beat (configuration bound; the area bound for pods).
        seconds: of the published program's plan; None: the step is too large for it, or it found none.
        optimal: that plan is the best one.
    """

    solver: str
    bound: float
    seconds: float | None
    optimal: bool


def static_times(lengths: Sequence[int], cluster: Cluster, model: CostModel, max_length: int = 0) -> Static:
    """Every degree that holds the step's longest document, each as a fixed one."""
    problem = Problem(lengths, cluster, model)
    seconds = {}
    for degree in sorted(set(problem.degree)):
        shelves = fixed(problem, degree, Work(UNLIMITED))
        if shelves:
            seconds[degree] = problem.total(shelves) * MICROSECOND
    held = smallest_degree(problem, max(max_length, problem.length[0]))
    return Static(seconds, held if held in seconds else min(seconds))


def solve(lengths: Sequence[int], cluster: Cluster, model: CostModel, plan: Plan, nodes: int) -> Solved:
    """The configuration bound, and for a small step the published program, started from the heuristic's plan."""
    name = solver_name()
    problem = Problem(lengths, cluster, model)
    bound = plan.bound
    if not plan.pod_ranks:
        bound = max(bound, configuration_bound(problem, round(plan.time / MICROSECOND)) * MICROSECOND)
    if len(lengths) > MOST_EXACT or plan.pod_ranks or model.objective != "sum":
        return Solved(name, bound, None, False)
    found = candidates(problem, Work(UNLIMITED), 0, small=False)
    warm = min(found.values(), key=problem.total)
    exact = milp(problem, None, len(warm), len(lengths), nodes, warm=warm)
    seconds = None if exact.shelves is None else exact.time * MICROSECOND
    return Solved(name, bound, seconds, exact.optimal)
