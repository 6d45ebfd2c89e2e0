"""Speeds of ranks that follow what equal work takes on each: a rank that throttles gets less to do from the next plans on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from longhaul.models.errors import UserError
from longhaul.parallel.planner.cluster import Cluster

WEIGHT = 0.2  # of a new measurement in the average
STEP = 0.05  # speeds are multiples of it once they move: ranks that are nearly alike are planned as alike
HYSTERESIS = 0.75 * STEP  # a speed stays until the average is further away than this


def followed(cluster: Cluster, average: Sequence[float], seconds: Sequence[float]) -> tuple[Cluster, tuple[float, ...]]:
    """The cluster with the speeds of now, and the new averages.

    The cost model follows what all ranks have in common, so only their ratios count here: the rank in the middle is taken to
    be as fast as before.

    Args:
        cluster: the present one.
        average: speed of each rank over the last measurements; empty: none were made.
        seconds: of each rank for the same work, equal lists on all ranks. [ranks]
    """
    if len(seconds) != cluster.ranks or min(seconds) <= 0:
        raise UserError(f"Speeds need one time above 0 for each of {cluster.ranks} ranks, not {len(seconds)} times.")
    speeds = cluster.speeds or (1.0,) * cluster.ranks
    before = tuple(average) or speeds
    # Measured against the speeds that plans use, not against the averages: those would drift with the noise of the middle.
    middle = sorted(speed * time for speed, time in zip(speeds, seconds, strict=True))[(cluster.ranks - 1) // 2]
    pairs = zip(before, seconds, strict=True)
    after = tuple(round(speed + WEIGHT * (middle / time - speed), 4) for speed, time in pairs)
    moved = tuple(_level(now) if abs(now - old) > HYSTERESIS else old for now, old in zip(after, speeds, strict=True))
    return replace(cluster, speeds=() if set(moved) == {1.0} else moved), after


def _level(speed: float) -> float:
    return max(STEP, round(round(speed / STEP) * STEP, 3))
