"""Ranks and links of different speed: shares, straddling groups, and the gain of knowing."""

import numpy as np
import pytest

from longhaul.parallel.planner import plan, published
from longhaul.parallel.planner.cluster import kinds_of
from longhaul.parallel.planner.problem import Problem
from tests.planner.setting import check, cluster_of, lengths_of

CASES = {
    "a slow node": (0.6,) * 8 + (1.0,) * 24,
    "half at half": (0.5,) * 16 + (1.0,) * 16,
    "a slow rank a node": ((0.7,) + (1.0,) * 7) * 4,
    "all different": tuple(0.5 + i / 64 for i in range(32)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("engine", ["head_split", "scan"])
def test_feasible_and_bounded(name, engine):
    cluster, model = cluster_of(32, speeds=CASES[name]), published(softmax=0.25, engine=engine)
    lengths = lengths_of(1, 60, 190_000)
    made = plan(lengths, cluster, model, budget=20_000)
    check(made, lengths, cluster, model)


@pytest.mark.parametrize("name", CASES)
def test_time_of_every_group_is_its_slowest_rank(name):
    """Predicted times against a dull count: tokens of each rank over its speed."""
    cluster, model = cluster_of(32, speeds=CASES[name]), published()
    lengths = lengths_of(2, 40, 190_000)
    made = plan(lengths, cluster, model, budget=20_000)
    layer = model.layers[0]
    for batch in made.micro_batches:
        for group in batch.groups:
            work = float(layer.compute(np.asarray([lengths[i] for i in group.documents])).sum())
            shares = np.diff(group.cuts) / group.tokens
            slowest = max(share / cluster.speeds[rank] for share, rank in zip(shares, group.ranks, strict=True))
            traffic = layer.per_token(cluster, group.degree, 1.0) * group.tokens
            # Cuts are whole tokens and times whole microseconds.
            assert group.time == pytest.approx(work * slowest + traffic, rel=2e-3, abs=2e-3 * group.degree)


def test_a_document_larger_than_one_speed_class_straddles():
    cluster, model = cluster_of(32, speeds=CASES["half at half"]), published()
    lengths = [32 * 6400, 100, 200, *[3000] * 6]
    made = plan(lengths, cluster, model)
    check(made, lengths, cluster, model)
    widest = max((group for batch in made.micro_batches for group in batch.groups), key=lambda group: group.degree)
    assert widest.degree == 32


def test_fast_ranks_get_more_where_memory_allows():
    cluster, model = cluster_of(8, speeds=(0.5,) * 4 + (1.0,) * 4), published()
    made = plan([16_000], cluster, model)
    (group,) = made.micro_batches[0].groups
    if group.degree == 8:
        held = np.diff(group.cuts)
        assert held[-1] > 1.9 * held[0]
    else:
        assert group.ranks.start == 4


def test_knowing_a_slow_node_helps():
    speeds = CASES["a slow node"]
    model = published()
    lengths = lengths_of(3, 200, 150_000)
    aware = plan(lengths, cluster_of(32, speeds=speeds), model, budget=200_000)
    all_slow = plan(lengths, cluster_of(32, speeds=(0.6,) * 32), model)
    ideal = plan(lengths, cluster_of(32), model)
    assert ideal.time < aware.time < 0.85 * all_slow.time


def test_a_slow_link_is_avoided():
    cluster, model = cluster_of(16, link_speeds=(0.1,) * 8 + (1.0,) * 8), published()
    made = plan([20_000], cluster, model)
    (group,) = made.micro_batches[0].groups
    assert group.ranks.start >= 8


@pytest.mark.parametrize("name", CASES)
def test_shares_and_capacity(name):
    cluster = cluster_of(32, speeds=CASES[name])
    for kind in kinds_of(cluster):
        capacity = kind.capacity(1000)
        for tokens in (0, 1, 7, capacity // 2, capacity):
            cuts = kind.cuts(tokens)
            assert cuts[-1] == tokens and max(np.diff(cuts)) <= 1000
    problem = Problem([100], cluster, published())
    ways = {kind.shares for kind in problem.kinds if kind.degree == 32}
    assert len(ways) == 3  # by speed, half-way, equal
