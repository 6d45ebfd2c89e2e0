"""Lengths, clusters, models and the invariants of a plan, shared by the planner's tests."""

import itertools
import math

import numpy as np

from longhaul.parallel.planner import Cluster, CostModel, LayerCost, Link, Plan, published
from longhaul.parallel.planner.cost import PUBLISHED_ALL_TO_ALL
from longhaul.parallel.planner.problem import NEVER, Problem


def lengths_of(seed: int, documents: int, cap: int, median: float = 1800.0) -> list[int]:
    """Long-tailed lengths."""
    random = np.random.default_rng(seed)
    body = median * np.exp(random.standard_normal(documents))
    tail = 8192.0 * random.random(documents) ** (-1 / 1.2)
    values = np.where(random.random(documents) < 0.92, body, tail)
    return np.clip(values, 1, cap).astype(int).tolist()


def cluster_of(ranks: int = 64, node: int = 8, memory: float = 30e9, **values) -> Cluster:
    links = (Link(ranks, 20e9, 2e-5),) if node >= ranks else (Link(node, 100e9, 1e-5), Link(ranks, 20e9, 2e-5))
    return Cluster(ranks, memory, links, PUBLISHED_ALL_TO_ALL, **values)


def tiny_model(capacity: int = 100, **values) -> CostModel:
    """A model in which a rank with `memory=capacity` bytes holds `capacity` tokens."""
    layer = LayerCost("softmax", 1, "head_split", linear=1e-3, quadratic=2e-5, token_bytes=1e6)
    return CostModel((layer,), 0.05, 1.0, 0.0, **values)


def models() -> dict[str, CostModel]:
    return {
        "softmax": published(),
        "hybrid all_gather": published(softmax=0.25, engine="all_gather"),
        "hybrid split": published(softmax=0.125, engine="scan", objective="split"),
        "linear head_split": published(softmax=0.0, engine="head_split"),
        "linear scan": published(softmax=0.0, engine="scan"),
        "13B": published("13B"),
    }


def check(plan: Plan, lengths: list[int], cluster: Cluster, model: CostModel) -> None:
    """Everything a plan promises except its quality."""
    capacity = model.tokens_per_rank(cluster)
    documents = [i for batch in plan.micro_batches for group in batch.groups for i in group.documents]
    assert sorted(documents) == list(range(len(lengths)))
    most = 0
    for batch in plan.micro_batches:
        ranks: set[int] = set()
        for group in batch.groups:
            degree = len(group.ranks)
            assert degree & (degree - 1) == 0 and group.ranks.start % degree == 0
            assert group.ranks.stop <= cluster.ranks and not ranks & set(group.ranks)
            ranks |= set(group.ranks)
            assert group.cuts[0] == 0 and len(group.cuts) == degree + 1
            assert group.cuts[-1] == sum(lengths[i] for i in group.documents)
            held = np.diff(group.cuts)
            assert held.min() >= 0 and held.max() <= capacity
            most = max(most, int(held.max()))
            assert group.documents and group.time > 0
        assert batch.time >= max(group.time for group in batch.groups) + model.bias - 1e-9 or model.objective == "split"
    assert plan.memory == model.memory(most) <= cluster.memory
    assert plan.bound <= plan.time + 1e-9
    assert plan.time == min(plan.candidates.values())
    assert 0.0 <= plan.idle <= 1.0 or math.isclose(plan.idle, 0.0, abs_tol=1e-9)


def brute_force(problem: Problem) -> int:
    """Optimum of an even cluster by trying every partition into groups and micro-batches."""
    count = len(problem.length)
    ranks = problem.cluster.ranks
    makespan: dict[tuple[int, ...], int] = {}

    def partitions(items: tuple[int, ...]):
        if not items:
            yield []
            return
        head, rest = items[0], items[1:]
        for size in range(len(rest) + 1):
            for others in itertools.combinations(rest, size):
                left = tuple(i for i in rest if i not in others)
                for more in partitions(left):
                    yield [(head, *others), *more]

    def group_time(group: tuple[int, ...], kind: int) -> int:
        if sum(problem.length[i] for i in group) > problem.capacity[kind]:
            return NEVER
        return problem.start[kind] + sum(problem.time[i][kind] for i in group)

    everything = tuple(range(count))
    for size in range(1, count + 1):
        for items in itertools.combinations(everything, size):
            best = NEVER
            for groups in partitions(items):
                if len(groups) > ranks:
                    continue
                for kinds in itertools.product(range(len(problem.degree)), repeat=len(groups)):
                    if sum(problem.degree[kind] for kind in kinds) <= ranks:
                        best = min(best, max(group_time(g, k) for g, k in zip(groups, kinds, strict=True)))
            makespan[items] = best
    best = NEVER
    for batches in partitions(everything):
        best = min(best, sum(problem.bias + makespan[batch] for batch in batches))
    return best
