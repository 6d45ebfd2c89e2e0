"""Plans: feasible, deterministic, between their bound and the static plans, and refused with a clear sentence."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from longhaul.models.errors import UserError
from longhaul.parallel.planner import Cluster, Link, plan, published
from longhaul.parallel.planner.problem import Problem, Work
from longhaul.parallel.planner.static import fixed
from tests.planner.setting import check, cluster_of, lengths_of, models, tiny_model


def best_static(lengths, cluster, model) -> float:
    problem = Problem(lengths, cluster, model)
    found = [fixed(problem, degree, Work(1 << 60)) for degree in set(problem.degree)]
    return min(problem.total(shelves) for shelves in found if shelves) * 1e-6


@pytest.mark.parametrize("name", models())
@pytest.mark.parametrize("cap", [20_000, 380_000])
def test_between_bound_and_static(name, cap):
    cluster, model = cluster_of(), models()[name]
    lengths = lengths_of(1, 96, cap)
    made = plan(lengths, cluster, model)
    check(made, lengths, cluster, model)
    assert made.time <= best_static(lengths, cluster, model) + 1e-9


@pytest.mark.parametrize(
    "lengths",
    [
        [1],
        [6400],
        [6401],
        [1] * 40,
        [6400] * 130,
        [409_600],
        [409_600, 1],
        [204_800] * 3,
        [30_000] * 20,
        [3000] * 70 + [100_000],
    ],
)
def test_awkward_lengths(lengths):
    cluster, model = cluster_of(), published()
    made = plan(lengths, cluster, model)
    check(made, lengths, cluster, model)
    assert made.time <= best_static(lengths, cluster, model) + 1e-9


@pytest.mark.parametrize("ranks", [1, 2, 3, 6, 12, 24, 40])
def test_any_number_of_ranks(ranks):
    cluster, model = cluster_of(ranks, node=4), published()
    lengths = lengths_of(ranks, 30, 6400 * (1 << (ranks.bit_length() - 1)))
    made = plan(lengths, cluster, model)
    check(made, lengths, cluster, model)
    assert made.time <= best_static(lengths, cluster, model) + 1e-9


@pytest.mark.parametrize("seed", range(6))
def test_random_steps_of_a_small_cluster(seed):
    cluster, model = cluster_of(8, node=4, memory=100.0), tiny_model()
    lengths = lengths_of(seed, 9 + 7 * seed, 800, median=60.0)
    made = plan(lengths, cluster, model)
    check(made, lengths, cluster, model)
    assert made.time <= best_static(lengths, cluster, model) + 1e-9


def test_limits_of_the_published_setting():
    """Looser than the numbers in docs/planner.md: catches a planner that stopped working, not noise."""
    cluster, model = cluster_of(), published()
    gaps, gains = [], []
    for seed in range(3):
        lengths = lengths_of(seed, 512, 393_216)
        made = plan(lengths, cluster, model)
        check(made, lengths, cluster, model)
        gaps.append(made.gap)
        problem = Problem(lengths, cluster, model)
        shelves = fixed(problem, 64, Work(1 << 60))
        gains.append(problem.total(shelves) * 1e-6 / made.time)
    assert sum(gaps) / 3 < 0.09
    assert sum(gains) / 3 > 1.3


def test_budget_is_work_and_more_of_it_is_kept():
    cluster, model = cluster_of(), published()
    lengths = lengths_of(5, 256, 300_000)
    poor, rich = plan(lengths, cluster, model, budget=2_000), plan(lengths, cluster, model, budget=200_000)
    check(poor, lengths, cluster, model)
    assert poor.work < rich.work
    assert poor.time <= best_static(lengths, cluster, model) + 1e-9


def test_more_memory_or_speed_never_lowers_the_bound_less():
    """The bound is monotone: cheaper resources, lower bound; more documents, higher bound."""
    model = published()
    lengths = lengths_of(7, 128, 150_000)
    base = plan(lengths, cluster_of(), model)
    fast = plan(lengths, cluster_of(speeds=(2.0,) * 64), model)
    more = plan([*lengths, 20_000], cluster_of(), model)
    assert fast.bound < base.bound < more.bound
    assert fast.time < base.time


def test_order_of_documents_does_not_matter():
    cluster, model = cluster_of(), published()
    lengths = lengths_of(8, 100, 100_000)
    assert plan(lengths, cluster, model).time == plan(lengths[::-1], cluster, model).time


SCRIPT = """
import sys
from tests.planner.setting import cluster_of, lengths_of
from longhaul.parallel.planner import plan, published
assert "torch" not in sys.modules
made = plan(lengths_of(3, 300, 380_000), cluster_of(), published(softmax=0.25))
print(hash((made.micro_batches, made.time, made.bound, made.candidate, made.work)))
"""


def test_same_plan_in_another_process_and_no_torch():
    outputs = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
        script = SCRIPT.replace("hash((", "repr((")
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
        )
        outputs.add(done.stdout)
    assert len(outputs) == 1 and "MicroBatch" in outputs.pop()


def test_head_limit_bounds_the_degree():
    model = published()
    model = replace(model, layers=tuple(replace(layer, max_degree=8) for layer in model.layers))
    made = plan(lengths_of(2, 60, 50_000), cluster_of(), model)
    assert max(group.degree for batch in made.micro_batches for group in batch.groups) <= 8


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (lambda: plan([500_000], cluster_of(), published()), ("500000", "409600", "train.stream_tokens")),
        (lambda: plan([100, 0], cluster_of(), published()), ("at least one token",)),
        (lambda: plan([], cluster_of(), published()), ("at least one document",)),
        (lambda: Cluster(8, 0.0, (Link(8, 1e9),)), ("no memory", "`memory`")),
        (lambda: Cluster.from_dict({"ranks": 8, "links": [{"span": 8, "bandwidth": 1e9}]}), ("no memory", "`memory`")),
        (lambda: Cluster.from_dict({"ranks": 8, "memory": 1, "links": [], "gpus": 3}), ("gpus",)),
        (lambda: Cluster(8, 1e9, (Link(4, 1e9),)), ("4 of 8",)),
        (lambda: Cluster(8, 1e9, (Link(8, 1e9),), speeds=(1.0,)), ("`speeds`", "8 ranks")),
        (lambda: plan([10], cluster_of(memory=1e9), published()), ("no room", "shard")),
        (lambda: plan([10] * 9, cluster_of(256), published(), pod_ranks=48), ("48", "power of two")),
        (lambda: published("70B"), ("70B", "7B")),
    ],
)
def test_refusals(case, words):
    with pytest.raises(UserError) as error:
        case()
    for word in words:
        assert word in str(error.value)


def test_cluster_file():
    values = {
        "ranks": 4,
        "memory": 1e9,
        "links": [{"span": 2, "bandwidth": 1e9, "latency": 1e-5}, {"span": 4, "bandwidth": 1e8}],
        "all_to_all": {"2": 5e8},
        "speeds": [1.0, 1.0, 0.5, 0.5],
    }
    cluster = Cluster.from_dict(values)
    assert cluster.exchange_bandwidth(2) == 5e8 and cluster.exchange_bandwidth(4) == 1e8
    assert cluster.link(2).latency == 1e-5 and cluster.speed(3) == 500


def test_pods():
    cluster, model = cluster_of(256), published()
    lengths = lengths_of(4, 700, 200_000)
    made = plan(lengths, cluster, model)
    check(made, lengths, cluster, model)
    assert made.candidate == "pods" and made.pod_ranks in (64, 128)
    for batch in made.micro_batches:
        for group in batch.groups:
            assert group.ranks.start // made.pod_ranks == (group.ranks.stop - 1) // made.pod_ranks
    flat = plan(lengths, cluster, model, pod_ranks=0, budget=5_000)
    check(flat, lengths, cluster, model)
    assert flat.pod_ranks == 0 and made.time < flat.time


def test_pods_grow_for_a_document_no_pod_holds():
    cluster, model = cluster_of(256), published()
    made = plan([800_000, *lengths_of(4, 200, 100_000)], cluster, model)
    assert made.pod_ranks in (0, 128)
    assert max(group.degree for batch in made.micro_batches for group in batch.groups) >= 128


@pytest.mark.parametrize(
    ("cluster", "model", "documents"),
    [
        (cluster_of(16), published(), 60),
        (cluster_of(16), published(softmax=0.25, objective="split"), 60),
        (cluster_of(16, speeds=(0.5,) * 8 + (1.0,) * 8), published(), 60),
        (cluster_of(256), published(), 200),
        (cluster_of(4), published(), 6),
    ],
    ids=["even", "split", "uneven", "pods", "exact"],
)
@pytest.mark.parametrize("every", [1, 3, 9])
def test_documents_are_kept_apart(cluster: Cluster, model, documents, every):
    """No group holds two of them, everything else is promised as before, and the others' plan is not touched without need."""
    lengths = lengths_of(documents, documents, 25_000)
    apart = range(0, documents, every)
    free = plan(lengths, cluster, model, budget=20_000)
    made = plan(lengths, cluster, model, budget=20_000, apart=apart)
    check(made, lengths, cluster, model)
    groups = [group for batch in made.micro_batches for group in batch.groups]
    assert max(len(set(group.documents) & set(apart)) for group in groups) == 1
    together = any(len(set(group.documents) & set(apart)) > 1 for batch in free.micro_batches for group in batch.groups)
    assert together or made == free
    assert plan(lengths, cluster, model, budget=20_000, apart=reversed(apart)) == made
    if every == 9:
        assert made.time < 1.2 * free.time
