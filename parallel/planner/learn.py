"""Costs that follow the step timers.

A micro-batch takes as long as its slowest group, so its time, the maximum over ranks, is a sample of the group that the
plan holds for the slowest. The last samples are fitted together: first one factor for all terms, then one a term, held
back to the first where samples do not tell terms apart. The state is a few numbers that JSON keeps; ranks with equal
samples hold equal models.

Legend: n samples kept, z share of a term in a sample's time under the first factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from longhaul.models.errors import UserError
from longhaul.parallel.planner.calibrate import TERMS, Sample, features, non_negative, quantise, scaled
from longhaul.parallel.planner.cluster import Cluster
from longhaul.parallel.planner.cost import CostModel
from longhaul.parallel.planner.speeds import followed

KEPT = 64  # samples; a few steps' worth
HOLD = 0.1  # weight of "all terms by one factor" beside n samples: a term needs a tenth of one sample's time to be fitted


@dataclass(frozen=True)
class Learner:
    """A cost model and what it learnt.

    Attributes:
        base: the model at the start.
        cluster: where samples run, with the ranks' speeds of now.
        scale: factor of each term of `base`.
        rows: of each sample kept, the seconds that each term of `base` predicts, then the seconds it took.
        average: of each rank's speed; empty until one was measured.
    """

    base: CostModel
    cluster: Cluster
    scale: tuple[float, ...] = (1.0,) * len(TERMS)
    rows: tuple[tuple[float, ...], ...] = ()
    average: tuple[float, ...] = ()

    @property
    def model(self) -> CostModel:
        """The model to plan with."""
        return scaled(self.base, np.asarray(self.scale))

    def update(self, samples: Sequence[Sample]) -> Learner:
        """The next state, given a step's samples, which are equal on all ranks."""
        taken = [
            (*(quantise(value) for value in features(sample, self.cluster, self.base)), quantise(sample.time))
            for sample in samples
            if sample.time > 0
        ]
        rows = (*self.rows, *taken)[-KEPT:]
        if not taken:
            return self
        return replace(self, rows=rows, scale=_fit(np.asarray(rows)))

    def paced(self, seconds: Sequence[float]) -> Learner:
        """The next state, given what the same work took on each rank; equal on all of them."""
        cluster, average = followed(self.cluster, self.average, seconds)
        return replace(self, cluster=cluster, average=average)

    def state(self) -> dict[str, list[float] | list[list[float]]]:
        """What a checkpoint keeps."""
        rows = [list(row) for row in self.rows]
        return {"scale": list(self.scale), "rows": rows, "speeds": list(self.cluster.speeds), "average": list(self.average)}

    def restored(self, state: dict[str, list]) -> Learner:
        """This learner with the numbers of a checkpoint.

        Raises:
            UserError: another version wrote them.
        """
        scale = tuple(float(value) for value in state["scale"])
        rows = tuple(tuple(float(value) for value in row) for row in state["rows"])
        if not {"speeds", "average"} <= set(state) or len(scale) != len(TERMS) or any(len(row) != len(TERMS) + 1 for row in rows):
            raise UserError(
                f"The checkpoint's learnt costs have {len(scale)} terms and the keys {', '.join(sorted(state))}, so it is of "
                "another version: set parallel.planner.learn to false for this run."
            )
        speeds, average = (tuple(float(value) for value in state[name]) for name in ("speeds", "average"))
        return replace(self, scale=scale, rows=rows, cluster=replace(self.cluster, speeds=speeds), average=average)


def _fit(rows: np.ndarray) -> tuple[float, ...]:
    """Factors of the terms from samples [n, terms + 1]."""
    table, times = rows[:, :-1], rows[:, -1]
    whole = float(np.median(times / table.sum(axis=1)))
    shares = table * whole / times[:, None]  # z [n, terms]
    hold = np.sqrt(HOLD) * np.eye(len(TERMS))
    found = non_negative(np.concatenate([shares, hold]), np.concatenate([np.ones(len(rows)), hold.sum(axis=1)]))
    return tuple(quantise(whole * value) for value in found.tolist())
