"""`longhaul bench planner`: what is slept is what was measured, every contestant runs every document, mistakes are sentences."""

from typing import Any

import pytest

from longhaul.launcher import cli
from longhaul.launcher.bench.planner import job_of, static_plan
from longhaul.launcher.bench.planner_kernels import Budget, KernelClock, KernelTimes, grid, lengths_of
from longhaul.launcher.bench.planner_ranks import HEAD, THIN, Job, Links, Shape, measure
from longhaul.launcher.config import TrainConfig
from longhaul.launcher.plan.calibrate import Timed
from longhaul.models.config import ModelConfig
from longhaul.models.errors import UserError
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
            for times in found[job.name].values():
                assert [len(step) for step in times] == [len(made.micro_batches) for made in job.plans]


def test_the_wire_takes_the_time_of_bytes_that_are_not_sent() -> None:
    links = Links(4, 0.001, 1e9, 1e8, slow=2.0)
    for ranks, bandwidth in ((4, 1e9), (8, 1e8)):
        whole, thin = links.wire(ranks), links.wire(ranks, THIN)
        assert whole.delay == thin.delay == 0.002
        assert thin.bandwidth is not None
        assert THIN * thin.bandwidth == pytest.approx(whole.bandwidth) == pytest.approx(bandwidth / 2)


def test_a_share_of_a_softmax_layer_is_timed_on_two_chunks() -> None:
    """Linear layers take what n / d tokens took; chunks of a softmax layer are timed when they are asked for, once."""
    model = ModelConfig(vocab_size=16, hidden_size=8, num_heads=2, num_layers=2, pattern="LN", linear_mixer="linear_attention")
    asked = []

    class Counted(KernelClock):
        def __call__(self, name: str, tokens: int, run: Any) -> float:
            run()
            asked.append((name, tokens))
            return 1.0

    whole = [Timed(mixer, tokens, 0.01 * tokens, False) for mixer in ("linear", "attention") for tokens in (1, 32, 64, 256)]
    overhead = {"L": 0.01, "N": 0.01}
    clock = Counted(Budget(1.0, lambda text: None), 1)
    times = KernelTimes(TrainConfig(model=model), whole, {"linear": "L", "attention": "N"}, overhead, clock)
    assert times["L", 64, 1] == pytest.approx(0.63) and times["L", 64, 2] == pytest.approx(0.31) and not asked
    assert times["N", 256, 1] == pytest.approx(2.55) and not asked
    assert times["N", 64, 2] == times["N", 64, 2] == pytest.approx(1.98) and asked == [("chunks of N / 2", 64)] * 2
    assert times.linear_work() == pytest.approx(2.55 / 256)


def test_what_would_take_too_long_is_refused() -> None:
    said: list[str] = []
    budget = Budget(1.0, said.append)
    budget.take(30.0, "steps")
    assert len(said) == 1
    with pytest.raises(UserError, match="--minutes is 1"):
        budget.take(70.0, "steps")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "3"], "give 2, 4 or 8"),
        (["--longest", "9000"], "no more than the 8800 tokens"),
        (["--patterns", "LM"], "give letters L and N"),
        (["--steps", "1"], "give at least 2"),
        (["--heads", "4"], "divides heads"),
        (["--pace", "0"], "--pace is 0"),
        (["--minutes", "0"], "--minutes is 0"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert cli.main(["bench", "planner", *arguments]) == 2
    assert said in capsys.readouterr().err
