"""Lower bounds on the time of a step, valid for any plan under the cost model."""

from __future__ import annotations

from longhaul.parallel.planner.problem import Problem


def area_bound(problem: Problem) -> int:
    """Least power-time of every document over the cluster's power, plus one bias for each micro-batch that memory forces."""
    return -(-sum(problem.area) // problem.power) + problem.shelves * problem.bias
