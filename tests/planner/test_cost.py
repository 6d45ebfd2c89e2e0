"""The cost model against formulas written out, and its calibration on times it did not make."""

import json
import math

import numpy as np
import pytest

from longhaul.models.errors import UserError
from longhaul.parallel.planner import CostModel, LayerCost, plan, published
from longhaul.parallel.planner.calibrate import (
    Sample,
    calibrate,
    kind_at,
    predict,
    prediction_error,
)
from longhaul.parallel.planner.cost import PUBLISHED, PUBLISHED_ALL_TO_ALL
from longhaul.parallel.planner.learn import KEPT, Learner
from longhaul.parallel.planner.problem import Problem
from longhaul.parallel.planner.speeds import STEP, followed
from tests.planner.setting import cluster_of, lengths_of


@pytest.mark.parametrize("degree", [8, 64])
def test_published_time_of_one_document(degree):
    s, (quadratic, linear, bias, _) = 50_000, PUBLISHED["7B"]
    expected = (quadratic * s * s + linear * s) / degree + 2.0e6 * s / (degree * PUBLISHED_ALL_TO_ALL[degree]) + bias
    assert predict(Sample((s,), degree, 1.0), cluster_of(), published()) == pytest.approx(expected, rel=1e-12)
    problem = Problem([s], cluster_of(), published())
    kind = problem.degree.index(degree)
    assert problem.time[0][kind] + problem.bias == pytest.approx(expected * 1e6, abs=2)


@pytest.mark.parametrize(
    ("engine", "once"),
    [
        ("all_gather", lambda d, latency, state: latency + (d - 1) * state),
        ("scan", lambda d, latency, state: math.ceil(math.log2(d)) * (latency + state)),
        ("ring", lambda d, latency, state: (d - 1) * (latency + state)),
    ],
)
@pytest.mark.parametrize("degree", [1, 4, 32])
def test_state_exchange(engine, once, degree):
    layer = LayerCost("linear", 5, engine, linear=1e-6, state_bytes=2e6, halo_bytes=3e4, passes=3)
    latency, bandwidth = (1e-5, 100e9) if degree <= 8 else (2e-5, 20e9)
    expected = 0.0 if degree == 1 else 5 * 3 * (once(degree, latency, 2e6 / bandwidth) + latency + 3e4 / bandwidth)
    assert layer.per_group(cluster_of(), degree, 1.0) == pytest.approx(expected)
    assert layer.per_token(cluster_of(), degree, 1.0) == 0.0


def test_window_counts_pairs():
    layer = LayerCost("softmax", 1, "ring", linear=0.0, quadratic=1.0, window=10)
    lengths = np.asarray([5, 10, 11, 40])
    # Twice the causal pairs of a window of 10, in the continuum: x^2 up to the window, 20 x - 100 beyond.
    assert layer.compute(lengths).tolist() == [25.0, 100.0, 120.0, 700.0]


def test_split_is_never_below_sum():
    lengths = lengths_of(0, 80, 100_000)
    joint, split = (plan(lengths, cluster_of(), published(softmax=0.25, objective=o)) for o in ("sum", "split"))
    assert split.objective == "split" and split.time >= joint.bound
    problem = Problem(lengths, cluster_of(), published(softmax=0.25, objective="split"))
    shelf = [[0, 0, 0, [70], -1], [0, 0, 1, [71], -1]]
    parts = [max(problem.parts[p][1][i][k] + problem.parts[p][0][k] for i, k in ((70, 0), (71, 1))) for p in (0, 1)]
    assert problem.shelf_time(shelf) == sum(parts)


def truth(sample: Sample, noise: float = 0.0) -> float:
    """Times with another law's constants: 1.7x quadratic, 0.8x linear, 1.3x traffic, 1.2x bias."""
    quadratic, linear, bias, _ = PUBLISHED["7B"]
    s = np.asarray(sample.lengths, float)
    compute = (1.7 * quadratic * (s * s).sum() + 0.8 * linear * s.sum()) / sample.degree
    traffic = (
        0.0 if sample.degree == 1 else 1.3 * 2.0e6 * s.sum() / (sample.degree * PUBLISHED_ALL_TO_ALL[sample.degree])
    )
    return (compute + traffic + 1.2 * bias) * (1.0 + noise)


def samples(seed: int, count: int, noise: float) -> list[Sample]:
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        degree = int(2 ** random.integers(0, 7))
        lengths = tuple(int(x) for x in random.integers(200, 6400 * degree // 4 + 400, random.integers(1, 4)))
        bare = Sample(lengths, degree, 1.0)
        found.append(Sample(lengths, degree, truth(bare, noise * random.standard_normal())))
    return found


@pytest.mark.parametrize(("noise", "limit"), [(0.0, 1e-3), (0.03, 0.04)])
def test_calibration_predicts_held_out_lengths(noise, limit):
    cluster, first = cluster_of(), published()
    fitted = calibrate(samples(0, 60, noise), cluster, first)
    held_out = samples(1, 40, noise)
    assert prediction_error(held_out, cluster, fitted) < limit < prediction_error(held_out, cluster, first)
    if not noise:
        assert fitted.layers[0].quadratic == pytest.approx(1.7 * first.layers[0].quadratic, rel=2e-3)
        assert fitted.bias == pytest.approx(1.2 * first.bias, rel=2e-3)


def test_calibration_keeps_what_no_sample_shows_and_nothing_negative():
    cluster, first = cluster_of(), published()
    alone = [Sample((length,), 1, truth(Sample((length,), 1, 1.0))) for length in (500, 2000, 6000)]
    fitted = calibrate(alone, cluster, first)
    assert fitted.layers[0].token_bytes == first.layers[0].token_bytes
    odd = [Sample((500,), 1, 2.0), Sample((6000,), 1, 0.5), Sample((3000,), 1, 1.0)]
    fitted = calibrate(odd, cluster, first)
    assert min(fitted.bias, fitted.layers[0].linear, fitted.layers[0].quadratic) >= 0.0
    with pytest.raises(UserError, match="at least two lengths"):
        calibrate(odd[:1], cluster, first)
    with pytest.raises(UserError, match="aligned"):
        kind_at(cluster, 8, 4)


def test_learnt_costs_follow_the_truth():
    """Samples of one step at a time, whose terms are off by different factors, within few steps."""
    learner = Learner(published(), cluster_of())
    held_out = samples(1, 40, 0.0)
    errors = [prediction_error(held_out, learner.cluster, learner.model)]
    for step in range(8):
        learner = learner.update(samples(10 + step, 6, 0.01))
        errors.append(prediction_error(held_out, learner.cluster, learner.model))
    assert errors[-1] < 0.02 < 0.1 < errors[0]
    assert len(learner.rows) == 48 and len(learner.update(samples(9, 60, 0.0)).rows) == KEPT


def test_learnt_costs_go_through_json_bit_for_bit():
    learner = Learner(published(), cluster_of()).update(samples(0, 7, 0.05))
    again = Learner(published(), cluster_of()).restored(json.loads(json.dumps(learner.state())))
    assert again == learner and again.model == learner.model != published()
    assert again.update(samples(1, 5, 0.05)) == learner.update(samples(1, 5, 0.05))
    with pytest.raises(UserError, match="another version"):
        learner.restored({"scale": [1.0], "rows": []})


def test_a_term_that_no_sample_shows_follows_the_others():
    alone = [Sample((length,), 1, 3.0 * predict(Sample((length,), 1, 1.0), cluster_of(), published())) for length in (900, 6000)]
    learner = Learner(published(), cluster_of()).update(alone)
    assert learner.scale == pytest.approx((3.0,) * 5, rel=1e-3)


def test_speeds_follow_stragglers():
    """Of eight ranks one turns slow and recovers; what all have in common, and a few per cent, move nothing."""
    cluster, average, random = cluster_of(8), (), np.random.default_rng(0)

    def steps(count: int, slow: float) -> None:
        nonlocal cluster, average
        for _ in range(count):
            noise = 1.0 + 0.02 * random.standard_normal(8)
            together = random.uniform(0.5, 2.0)
            cluster, average = followed(cluster, average, (together * noise * ([1.0] * 7 + [slow])).tolist())

    steps(20, 1.0)
    assert cluster == cluster_of(8)
    steps(30, 2.0)
    assert cluster.speeds[:7] == (1.0,) * 7 and cluster.speeds[7] == pytest.approx(0.5, abs=STEP)
    steps(40, 1.0)
    assert cluster == cluster_of(8), "an even cluster is planned faster"
    with pytest.raises(UserError, match="8 ranks"):
        followed(cluster, (), [1.0])


def test_speeds_of_a_cluster_file_are_where_they_start():
    cluster, average = cluster_of(4, speeds=(0.33, 0.33, 1.0, 1.0)), ()
    for _ in range(5):
        cluster, average = followed(cluster, average, [3.03, 3.03, 1.0, 1.0])
    assert cluster.speeds == (0.33, 0.33, 1.0, 1.0)
    for _ in range(30):
        cluster, average = followed(cluster, average, [3.03, 3.03, 1.0, 2.0])
    assert cluster.speeds == (0.33, 0.33, 1.0, 0.5)


def test_a_sample_takes_as_long_as_the_rank_with_most_for_its_speed():
    """A group whose tokens were shared before a rank's speed was known."""
    cluster, model = cluster_of(4, speeds=(1.0, 0.5, 1.0, 1.0)), published()
    even, knowing = ((0, 500, 1000), (0, 667, 1000))
    late, alone = (predict(Sample((1000,), 2, 1.0, 0, cuts), cluster, model) for cuts in (even, (0, 1000, 1000)))
    assert late == pytest.approx(alone, rel=1e-3), "half of the tokens at half the speed"
    best = predict(Sample((1000,), 2, 1.0, 0, knowing), cluster, model)
    assert best < late and best == pytest.approx(predict(Sample((1000,), 2, 1.0), cluster, model), rel=1e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LayerCost("conv", 1, "ring", 1.0),
        lambda: LayerCost("linear", 1, "ulysses", 1.0),
        lambda: LayerCost("softmax", 1, "ring", -1.0),
        lambda: CostModel((), 0.0, 1.0),
        lambda: published(objective="max"),
    ],
)
def test_refusals(make):
    with pytest.raises(UserError):
        make()
