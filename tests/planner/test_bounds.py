"""Bounds are below the optimum, and the optimum is what the planner returns for a few documents."""

import importlib.util

import numpy as np
import pytest

from longhaul.models.errors import UserError
from longhaul.parallel.planner import CostModel, LayerCost, milp, plan, published
from longhaul.parallel.planner.aggregated import aggregated_bound
from longhaul.parallel.planner.bounds import area_bound, configuration_bound
from longhaul.parallel.planner.exact import exact
from longhaul.parallel.planner.fill import lowest
from longhaul.parallel.planner.plan import candidates
from longhaul.parallel.planner.problem import Problem, Work
from longhaul.parallel.planner.program import bucket_cuts
from tests.planner.setting import brute_force, check, cluster_of, lengths_of, tiny_model

pytestmark = pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="bounds need a solver")


def small(seed: int, documents: int, ranks: int = 4, cap: int = 399) -> Problem:
    random = np.random.default_rng(seed)
    lengths = np.clip(60 * np.exp(random.standard_normal(documents)), 1, cap).astype(int).tolist()
    model = tiny_model()
    if seed % 2:  # groups that cost something empty
        layers = (*model.layers, LayerCost("linear", 2, "all_gather", linear=1e-4, state_bytes=1e7))
        model = CostModel(layers, model.bias, 1.0)
    return Problem(lengths, cluster_of(ranks, node=2, memory=100.0), model)


@pytest.mark.parametrize("seed", range(8))
def test_exact_is_brute_force(seed):
    problem = small(seed, 4 + seed % 2)
    assert problem.total(exact(problem, Work(1 << 60))) == brute_force(problem)


@pytest.mark.parametrize("seed", range(24))
def test_bounds_below_optimum_below_candidates(seed):
    problem = small(seed, 3 + seed % 5, ranks=4 + 4 * (seed % 2))
    best = problem.total(exact(problem, Work(1 << 60)))
    found = candidates(problem, Work(50_000), 0, small=False)
    least = min(map(problem.total, found.values()))
    assert area_bound(problem) <= best <= least
    tight = configuration_bound(problem, least, classes=12, singles=3 + seed % 3, buckets=2)
    assert area_bound(problem) <= tight <= best


@pytest.mark.parametrize("seed", range(5))
def test_the_program_finds_the_same_optimum(seed):
    problem = small(seed, 4)
    best = exact(problem, Work(1 << 60))
    found = milp.milp(problem, micro_batches=2, buckets=99, nodes=20_000)
    assert found.optimal and not found.bucketed
    if len(best) <= 2:
        assert found.time == problem.total(best) and found.bound == pytest.approx(found.time, rel=1e-5)
    else:
        assert found.time > problem.total(best)


def test_the_program_of_uneven_ranks():
    problem = Problem([50, 40, 30, 20], cluster_of(4, node=2, memory=100.0, speeds=(0.5, 0.5, 1.0, 1.0)), tiny_model())
    found = milp.milp(problem, micro_batches=1, buckets=9, nodes=20_000)
    made = plan([50, 40, 30, 20], problem.cluster, problem.model)
    assert found.optimal and found.time <= round(made.time * 1e6)
    assert configuration_bound(problem, found.time + 1) <= found.time


@pytest.mark.parametrize("seed", range(4))
def test_aggregated_bound_below_one_micro_batch(seed):
    problem = small(seed, 5, cap=80)
    documents = list(range(5))
    filled = lowest(problem, documents, Work(1 << 60), 1 << 40, steps=40)
    found = milp.milp(problem, micro_batches=1, buckets=99, nodes=20_000)
    bound = aggregated_bound(problem, documents, steps=30)
    assert found.optimal and bound + problem.bias <= found.time
    assert filled is None or found.time <= filled.time + problem.bias


def test_bounds_of_a_real_step():
    model, cluster = published(softmax=0.25, engine="all_gather"), cluster_of()
    lengths = lengths_of(2, 160, 200_000)
    made = plan(lengths, cluster, model)
    problem = Problem(lengths, cluster, model)
    tight = configuration_bound(problem, round(made.time * 1e6), classes=10, singles=40, buckets=4) * 1e-6
    assert made.bound <= tight <= made.time


def test_bucket_cuts_add_the_fewest_tokens():
    lengths = sorted((int(x) for x in np.random.default_rng(0).integers(1, 60, 9)), reverse=True)

    def added(cuts):
        return sum(lengths[a] * (b - a) - sum(lengths[a:b]) for a, b in zip(cuts, cuts[1:], strict=False))

    import itertools

    for buckets in (1, 2, 3, 4):
        every = [[0, *inner, 9] for inner in itertools.combinations(range(1, 9), buckets - 1)]
        assert added(bucket_cuts(lengths, buckets)) == min(map(added, every))
    assert bucket_cuts(lengths, 20) == list(range(10))


def test_warm_start_and_solution_agree():
    problem = small(0, 5)
    shelves = exact(problem, Work(1 << 60))
    program = milp.Program(problem, range(5), len(shelves), 99, 1)
    values = program.start_from(shelves)
    assert values is not None
    matrix, limits = program.rows.matrix(program.columns), np.concatenate(program.rows.limits)
    assert (matrix @ values <= limits + 1e-6).all()
    assert float(program.cost @ values) * milp.TICK == pytest.approx(problem.total(shelves))
    back = program.shelves_from(values)
    assert problem.total(back) == problem.total(shelves)


@pytest.mark.skipif(importlib.util.find_spec("highspy") is None, reason="only highspy takes a warm start")
def test_highspy_starts_from_a_plan():
    problem = small(0, 5)
    shelves = exact(problem, Work(1 << 60))
    found = milp.milp(problem, micro_batches=len(shelves), buckets=99, nodes=1, warm=shelves, solver="highspy")
    assert found.time == problem.total(shelves) and found.bound <= found.time


def test_no_solver_is_a_clear_sentence(monkeypatch):
    monkeypatch.setattr(milp.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"planner\].*shelf"):
        milp.milp(small(0, 3))
    with pytest.raises(UserError, match=r"highspy.*planner\]"):
        milp.milp(small(0, 3), solver="highspy")


def test_exact_candidate_wins_small_steps():
    lengths = [300, 40, 90, 120]
    cluster, model = cluster_of(4, node=2, memory=100.0), tiny_model()
    made = plan(lengths, cluster, model)
    check(made, lengths, cluster, model)
    assert made.candidate == "exact"
    assert round(made.time * 1e6) == brute_force(Problem(lengths, cluster, model))
