"""Plans made ahead: the same after a resume, whatever the threads did; what cannot be planned is refused early."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longhaul.launcher.data import Stream
from longhaul.launcher.parsing import parse
from longhaul.launcher.planned.ahead import Step, StepPlanner, pieces_of
from longhaul.launcher.planned.config import PlannerConfig
from longhaul.launcher.planned.inputs import check_lengths, planner_inputs
from longhaul.models.errors import UserError
from longhaul.parallel.comm import Comm
from longhaul.parallel.mesh import Degrees
from longhaul.parallel.planner import Cluster, CostModel, GroupPlan, LayerCost, Link
from longhaul.parallel.planner.calibrate import Sample, predict
from longhaul.parallel.runtime import Runtime
from tests.harness import run_ranks
from tests.harness.numerics import assert_bitwise_equal, assert_close
from tests.planner.runs import PLANNED, arguments, job, write_documents
from tests.planner.setting import lengths_of

LAYER = LayerCost("softmax", 2, "ring", linear=1e-5, quadratic=2e-8, token_bytes=2e3)
MODEL = CostModel((LAYER,), 0.004, 1.0)
CLUSTER = Cluster(8, 4000.0, (Link(8, 1e9, 1e-4),))


def stream_of(index: int) -> Stream:
    """Long-tailed documents; the tokens do not matter here."""
    bounds = [0]
    for length in lengths_of(index, 40, 8000, median=300.0):
        bounds.append(bounds[-1] + length)
    none = torch.zeros(bounds[-1])
    return Stream(none, none, torch.ones(bounds[-1]), tuple(bounds), first_position=3 * index)


def planner_of(ahead: int, **values: Any) -> StepPlanner:
    config = PlannerConfig(enabled=True, ahead=ahead, **values)
    return StepPlanner(lambda first: [stream_of(first), stream_of(first + 1)], 2, CLUSTER, MODEL, config)


def times_of(step: Step) -> list[float]:
    """Measured times: each group's by the first model, and then some; a micro-batch's is its slowest group's."""
    assert step.plan is not None

    def of(group: GroupPlan) -> float:
        lengths = tuple(step.pieces[index].length for index in group.documents)
        return 0.01 + 1.4 * predict(Sample(lengths, group.degree, 1.0, group.ranks.start), CLUSTER, MODEL)

    return [max(map(of, batch.groups)) for batch in step.plan.micro_batches]


def go(planner: StepPlanner, first: int, steps: int, slow: float = 1.0) -> list[Step]:
    """Steps of which the last rank takes `slow` times as long as the others for the same work."""
    found = []
    for number in range(first, first + steps):
        found.append(planner.take(2 * number))
        planner.learn(found[-1], times_of(found[-1]), [1.0] * 7 + [slow])
    return found


@pytest.mark.parametrize("ahead", [1, 3])
def test_plans_are_the_same_after_a_resume(ahead: int) -> None:
    whole = planner_of(ahead)
    before, after = go(whole, 0, 5, slow=2.0), go(whole, 5, 4, slow=2.0)
    first = planner_of(ahead)
    assert [step.plan for step in go(first, 0, 5, slow=2.0)] == [step.plan for step in before]
    second = planner_of(ahead)
    assert second.restore(json.loads(json.dumps(first.state())))
    assert [step.plan for step in go(second, 5, 4, slow=2.0)] == [step.plan for step in after]
    assert second.learner == whole.learner
    assert second.learner.cluster.speeds[-1] < 0.9, "the last rank turned slow"
    # What would be planned without the costs is another plan, so the comparison sees them.
    assert [step.plan.time for step in go(planner_of(ahead), 5, 4)] != [step.plan.time for step in after]


def test_costs_learnt_elsewhere_are_left() -> None:
    planner = planner_of(1)
    go(planner, 0, 2)
    other = StepPlanner(planner.read, 2, replace(CLUSTER, ranks=4, links=(Link(4, 1e9),)), MODEL, planner.config)
    assert not other.restore(planner.state()) and not other.restore(None)
    assert other.learner.scale == (1.0,) * 5


def test_prediction_error_falls() -> None:
    planner = planner_of(1)
    steps = go(planner, 0, 6)
    errors = [abs(step.plan.time / sum(times_of(step)) - 1.0) for step in steps if step.plan]
    assert errors[0] > 0.25 and errors[-1] < 0.05


def test_a_slow_rank_gets_less() -> None:
    step = go(planner_of(1), 0, 9, slow=2.0)[-1]
    assert step.plan is not None
    held = [0] * 8
    for group in (group for batch in step.plan.micro_batches for group in batch.groups):
        for rank, start, stop in zip(group.ranks, group.cuts, group.cuts[1:]):
            held[rank] += stop - start
    assert held[7] < 0.9 * sum(held[:7]) / 7


def test_pieces_are_cut_where_streams_end() -> None:
    streams = [
        Stream(*[torch.ones(9)] * 3, bounds=(0, 4, 9), first_position=5),
        Stream(*[torch.ones(3)] * 3, bounds=(0, 3), first_position=2),
    ]
    found = [(piece.stream, piece.start, piece.stop, piece.position) for piece in pieces_of(streams)]
    assert found == [(0, 0, 4, 5), (0, 4, 9, 0), (1, 0, 3, 2)]


def test_a_mistake_in_the_thread_is_told() -> None:
    planner = planner_of(1)
    planner.read = lambda first: (_ for _ in ()).throw(UserError("The file x is gone."))
    with pytest.raises(UserError, match="x is gone"):
        planner.take(0)


def test_too_long_a_document_is_refused_or_streamed() -> None:
    with pytest.raises(UserError, match=r"A document of 32001 tokens does not fit the 32000 .*train\.stream_tokens"):
        check_lengths(32001, CLUSTER, MODEL, None)
    check_lengths(32000, CLUSTER, MODEL, None)
    check_lengths(99999, CLUSTER, MODEL, 500)
    with pytest.raises(UserError, match="stream_tokens 40000 is more than the 32000 tokens"):
        check_lengths(99999, CLUSTER, MODEL, 40000)


ON = ("--parallel.planner.enabled", "true")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--parallel.sequence_parallel_size", "2"), "parallel.planner chooses it for every group"),
        (("--parallel.pipeline_parallel_size", "2"), "a pipeline passes on micro-batches of one size"),
        (("--parallel.exchange", "hierarchical"), "use log_scan"),
        (("--parallel.attention", "usp"), "use ulysses"),
        (("--parallel.planner.ahead", "0"), "give 1 or more"),
        (("--parallel.planner.memory_token", "5"), "did you mean --parallel.planner.memory_tokens"),
    ],
)
def test_what_a_plan_cannot_be_combined_with(flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse([*ON, *flags])
    assert said in str(caught.value)


def test_carried_states_are_refused() -> None:
    config = parse([*ON, "--data.carry_state", "true"])
    with pytest.raises(UserError, match=r"data\.carry_state needs a stream's documents in order"):
        config.resolve(1)


def test_no_memory_and_another_cluster(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"give parallel\.planner\.memory_tokens.* or parallel\.planner\.cluster"):
        planner_inputs(parse([*ON]), Comm(None), Runtime(device="cpu"))
    with pytest.raises(UserError, match="has 64 ranks, but 1 are planned"):
        planner_inputs(parse([*ON, "--parallel.planner.cluster", "a100_64"]), Comm(None), Runtime(device="cpu"))
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("ranks: 1\nlinks: {node: {bandwidth: 1.0e+9}}\n")
    with pytest.raises(UserError, match="states no memory: give one of memory"):
        planner_inputs(parse([*ON, "--parallel.planner.cluster", str(cluster)]), Comm(None), Runtime(device="cpu"))


class Clock:
    """Times that only the place in the step decides."""

    def __init__(self, device: torch.device) -> None:
        self.laps = 0

    def lap(self) -> None:
        self.laps += 1

    def seconds(self) -> list[float]:
        return [0.02 + 0.005 * lap for lap in range(self.laps)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ahead")
    write_documents(root / "corpus")
    return root


def test_a_resumed_run_plans_and_trains_as_the_whole_one(folder: Path) -> None:
    values = {**PLANNED, "parallel.planner.learn": True, "train.steps": 4, "checkpoint.every": 2, "checkpoint.keep": 0}
    values |= {"optimizer.name": "adamw", "optimizer.lr": 1e-3, "model.linear_mixer": "linear_attention"}
    values["checkpoint.folder"] = folder / "whole"
    whole = run_ranks(job, 4, timeout=120, argv=arguments(folder, values), clock=Clock)
    rest = {**values, "checkpoint.folder": folder / "rest", "checkpoint.resume": folder / "whole" / "step_2"}
    found = run_ranks(job, 4, timeout=120, argv=arguments(folder, rest), clock=Clock)
    for one, other in zip(whole, found):
        assert other["plans"] == one["plans"][2:] == whole[0]["plans"][2:]
        for name, parameter in one["parameters"].items():
            assert_bitwise_equal(other["parameters"][name], parameter, name)
    said = whole[0]["said"]
    assert said[-1]["planner/predicted(s)"] != said[0]["planner/predicted(s)"]
    assert all(each["planner/measured(s)"] > 0 and each["planner/micro_batches"] >= 1 for each in said)


def test_documents_that_fit_nowhere_are_streamed(folder: Path) -> None:
    """Three ranks: the largest block has two, and the third takes part in every collective without a token."""
    model = {"model.pattern": "LN", "model.linear_mixer": "gated_deltanet", "train.steps": 3, "data.validation_fraction": 0.2}
    static = run_ranks(job, 1, timeout=120, argv=arguments(folder, model), dtype=torch.float64)[0]
    small = {"parallel.planner.memory_tokens": 60, "train.stream_tokens": 50}
    found = run_ranks(job, 3, timeout=120, argv=arguments(folder, {**model, **PLANNED, **small}), dtype=torch.float64)
    for result in found:
        for name, gradient in static["first"].items():
            assert_close(result["first"][name], gradient, f"gradient of {name} at step 1")
        for name, parameter in static["parameters"].items():
            assert_close(result["parameters"][name], parameter, name)
        assert result["held_out"] == pytest.approx(static["held_out"], rel=1e-9)


def other_documents(rank: int, world_size: int) -> str:
    from longhaul.parallel.executor import Executor
    from longhaul.parallel.mesh import ParallelMesh

    executor = Executor(ParallelMesh(Degrees(world_size), rank))
    plan = planner_of(1).make([stream_of(1)]).plan
    assert plan is not None
    executor.agree(plan, [1, 2, 3])
    try:
        executor.agree(plan, [1, 2, 3 + rank])
    except UserError as error:
        return str(error)
    return "nothing failed"


def test_ranks_that_planned_differently_stop() -> None:
    assert all("compare data.paths" in each for each in run_ranks(other_documents, 2))
