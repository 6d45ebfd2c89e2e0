"""`longhaul bench planner`: what is slept is what was measured, every contestant runs every document, mistakes are sentences."""

from typing import Any

import pytest

from longhaul.launcher import cli
from longhaul.launcher.bench.planner import grid, job_of, lengths_of, static_plan
from longhaul.launcher.bench.planner_ranks import HEAD, Job, Links, Shape, measure
from longhaul.parallel.planner import Cluster, CostModel, LayerCost, Link, plan
from longhaul.parallel.runtime import Runtime
from tests.harness import run_ranks

MODEL = CostModel((LayerCost("linear", 2, "all_gather", linear=1e-5, state_bytes=1e3),), 0.001, 1.0)
CLUSTER = Cluster(2, 300.0, (Link(2, 1e8, 1e-4),))
LENGTHS = [256, 152, 128, 512, 184]


def test_halves_of_the_grid_are_on_it() -> None:
    lengths = grid(4096)
    assert lengths[0] == 128 and lengths[-1] == 4096
    assert all(length // 2 in lengths for length in lengths if length >= 256)
    assert all(length % 8 == 0 for length in lengths)


def test_lengths_are_those_of_python() -> None:
    steps = lengths_of(3, 20, 4096, seed=1)
    assert [len(step) for step in steps] == [20, 20, 20] and steps == lengths_of(3, 20, 4096, seed=1)
    assert steps != lengths_of(3, 20, 4096, seed=2)
    everything = [length for step in steps for length in step]
    assert set(everything) <= set(grid(4096)) and max(everything) > 3 * sorted(everything)[30]


def jobs() -> list[Job]:
    times = {(letter, length, degree): 1.0 * length / degree for letter in ("L", HEAD) for length in LENGTHS for degree in (1, 2)}
    overhead = {"L": 0.5, HEAD: 0.25}
    contestants = {"planned": plan(LENGTHS, CLUSTER, MODEL), "degree 2": static_plan(LENGTHS, CLUSTER, MODEL, 2)}
    assert static_plan(LENGTHS, CLUSTER, MODEL, 1) is None, "512 tokens fit no rank alone"
    return [job_of(name, [made], [LENGTHS], times, overhead) for name, made in contestants.items() if made is not None]


def test_what_is_slept_is_what_was_measured() -> None:
    for job in jobs():
        (made,), (step,) = job.plans, job.seconds
        assert sorted(i for batch in made.micro_batches for group in batch.groups for i in group.documents) == [0, 1, 2, 3, 4]
        for batch, seconds in zip(made.micro_batches, step, strict=True):
            for group, each in zip(batch.groups, seconds, strict=True):
                assert each == {"L": 0.5 + group.tokens / group.degree, HEAD: 0.25 + group.tokens / group.degree}


def ranks_run(rank: int, world_size: int) -> dict[str, Any]:
    awake = []
    for job in jobs():  # nothing is slept here
        none = tuple(tuple(tuple({"L": 0.0, "N": 0.0, HEAD: 0.0} for _ in batch) for batch in step) for step in job.seconds)
        awake.append(Job(job.name, job.plans, none))
    links = Links(1, 0.0, 1e12, 1e12)
    return measure(Runtime(rank, world_size, device="cpu"), Shape("LN", 2, 8), links, "all_gather", awake)


def test_every_rank_runs_every_micro_batch() -> None:
    for found in run_ranks(ranks_run, 2):
        for job in jobs():
            assert [len(step) for step in found[job.name]] == [len(made.micro_batches) for made in job.plans]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "3"], "give 2, 4 or 8"),
        (["--longest", "9000"], "no more than the 8800 tokens"),
        (["--patterns", "LM"], "give letters L and N"),
        (["--steps", "0"], "--steps is 0"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert cli.main(["bench", "planner", *arguments]) == 2
    assert said in capsys.readouterr().err
