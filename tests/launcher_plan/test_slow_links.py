"""Links so slow that a larger group is slower: every document still finds a place."""

from longhaul.launcher.config import TrainConfig
from longhaul.launcher.plan.census import facts_of
from longhaul.launcher.plan.costs import cost_model, published_constants
from longhaul.launcher.plan.inputs import make_cluster
from longhaul.parallel.planner import plan
from longhaul.parallel.planner.problem import Problem
from tests.launcher_plan.files import LENGTHS, cluster_values


def test_every_document_is_placed() -> None:
    config = TrainConfig()
    model = cost_model(facts_of(config.model), config, published_constants(), 8)
    links = {"node": {"bandwidth": 1e10, "latency": 1e-5}, "network": {"bandwidth": 1e9, "latency": 2e-5}}
    cluster = make_cluster(cluster_values(links=links), model)
    lengths = LENGTHS * 2
    assert not Problem(lengths, cluster, model).falling
    made = plan(lengths, cluster, model)
    placed = sorted(d for micro_batch in made.micro_batches for group in micro_batch.groups for d in group.documents)
    assert placed == list(range(len(lengths)))
    assert made.bound <= made.time
