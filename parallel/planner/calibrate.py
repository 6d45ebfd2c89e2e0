"""Fit the cost model to measured times by least squares (`learn.py` goes on with each step's timers).

A sample is a group that ran alone or in a step: its documents' lengths, its kind of block and the seconds it took. The
unknowns are the coefficients of the model: quadratic and linear seconds of each kind of layer cannot be told apart by a
whole step's time, so a fit scales the *terms*: quadratic work, linear work, communication per token, communication per
group, and the bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from longhaul.models.errors import UserError
from longhaul.parallel.planner.cluster import SPEED_STEPS, Cluster, Kind, kinds_of
from longhaul.parallel.planner.cost import CostModel

TERMS = ("quadratic", "linear", "traffic", "exchange", "bias")
DIGITS = 4  # significant digits kept: every rank rounds to the same model


@dataclass(frozen=True)
class Sample:
    """A measured group: lengths of its documents, its degree, the seconds it took (bias included), its first rank, and where
    its stream was cut (empty: by the ranks' speeds).
    """

    lengths: tuple[int, ...]
    degree: int
    time: float
    first: int = 0
    cuts: tuple[int, ...] = ()


def kind_at(cluster: Cluster, degree: int, first: int = 0) -> Kind:
    """Kind of the block that starts at `first`, tokens shared by speed."""
    for kind in kinds_of(cluster):
        if kind.degree == degree and first in kind.firsts:
            candidates = [other for other in kinds_of(cluster) if other.degree == degree and first in other.firsts]
            return min(candidates, key=lambda other: other.slowdown)
    raise UserError(
        f"No block of degree {degree} starts at rank {first}: degrees are powers of two, aligned to themselves."
    )


def features(sample: Sample, cluster: Cluster, model: CostModel) -> np.ndarray:
    """Seconds that each term of the model predicts for a sample. -> [terms]"""
    kind = kind_at(cluster, sample.degree, sample.first)
    lengths = np.asarray(sample.lengths, np.int64)
    share = _slowest_share(sample, cluster) if sample.cuts else kind.slowdown / kind.degree
    found = np.zeros(len(TERMS))
    for layer in model.layers:
        linear = layer.layers * layer.linear * float(lengths.sum())
        found[0] += (float(layer.compute(lengths).sum()) - linear) * share
        found[1] += linear * share
        found[2] += layer.per_token(cluster, kind.degree, kind.link_speed) * float(lengths.sum())
        found[3] += layer.per_group(cluster, kind.degree, kind.link_speed)
    found[4] = model.bias
    return found


def _slowest_share(sample: Sample, cluster: Cluster) -> float:
    """Largest share of the tokens over the speed of the rank that holds it."""
    ranks = range(sample.first, sample.first + sample.degree)
    held = [stop - start for start, stop in pairwise(sample.cuts)]
    return max(SPEED_STEPS * tokens / cluster.speed(rank) for tokens, rank in zip(held, ranks, strict=True)) / sample.cuts[-1]


def quantise(value: float) -> float:
    """A value rounded to a few significant digits."""
    return float(f"{value:.{DIGITS - 1}e}")


def scaled(model: CostModel, scale: np.ndarray) -> CostModel:
    """The model with each term multiplied: traffic by its bytes, exchange by its passes (latency and bytes alike)."""
    layers = tuple(
        replace(
            layer,
            quadratic=quantise(layer.quadratic * scale[0]),
            linear=quantise(layer.linear * scale[1]),
            token_bytes=quantise(layer.token_bytes * scale[2]),
            passes=quantise(layer.passes * scale[3]),
        )
        for layer in model.layers
    )
    return replace(model, layers=layers, bias=quantise(model.bias * scale[4]))


def predict(sample: Sample, cluster: Cluster, model: CostModel) -> float:
    """Predicted seconds of a sample, bias included."""
    return float(features(sample, cluster, model).sum())


def prediction_error(samples: Sequence[Sample], cluster: Cluster, model: CostModel) -> float:
    """Mean relative error of the model's times: 0.06 is six per cent."""
    errors = [abs(predict(sample, cluster, model) - sample.time) / sample.time for sample in samples]
    return sum(errors) / len(errors)


def fit_scale(samples: Sequence[Sample], cluster: Cluster, model: CostModel) -> np.ndarray:
    """Non-negative least squares of relative errors; a term that no sample shows keeps its value. -> [terms]"""
    table = np.stack([features(sample, cluster, model) for sample in samples])  # [samples, terms]
    times = np.asarray([sample.time for sample in samples])
    weighted = table / times[:, None]
    seen = np.flatnonzero(weighted.max(axis=0) > 1e-6)
    scale = np.ones(len(TERMS))
    target = 1.0 - weighted[:, [t for t in range(len(TERMS)) if t not in seen]].sum(axis=1)
    scale[seen] = non_negative(weighted[:, seen], target)
    return scale


def non_negative(table: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least squares with no negative coefficient: [samples, terms], [samples] -> [terms]."""
    scale = np.zeros(table.shape[1])
    active = list(range(table.shape[1]))
    while active:  # drop the most negative term until none is: few terms, so this is cheap and deterministic
        found = np.linalg.lstsq(table[:, active], target, rcond=1e-9)[0]
        worst = int(np.argmin(found))
        if found[worst] >= 0.0:
            scale[active] = found
            break
        active.pop(worst)
    return scale


def calibrate(samples: Sequence[Sample], cluster: Cluster, model: CostModel) -> CostModel:
    """Model whose terms are fitted to the samples.

    Args:
        samples: measured groups, of several lengths and degrees.
        cluster: where they ran.
        model: structure and first guess.
    """
    if len(samples) < 2:
        raise UserError(
            f"{len(samples)} samples cannot fit a cost model: time groups of at least two lengths and two degrees."
        )
    if any(sample.time <= 0 for sample in samples):
        raise UserError("A sample took no time: time groups with a synchronised clock.")
    return scaled(model, fit_scale(samples, cluster, model))
