"""`parallel.pipeline_costs measured`: stages are cut by what layers took, alike on all processes."""

from pathlib import Path
from typing import Any

import pytest

from longhaul.launcher.config import ParallelConfig, TrainConfig
from longhaul.launcher.plan.calibrate import Run
from longhaul.launcher.plan.census import HEAD
from longhaul.launcher.stage_costs import MOST, measured_costs
from longhaul.models.errors import UserError
from longhaul.models.lm import LanguageModel
from longhaul.parallel.comm import Comm
from longhaul.parallel.mesh import Degrees, ParallelMesh
from longhaul.parallel.pipeline.layers import PipelineParallel
from longhaul.parallel.runtime import Runtime
from tests.harness import run_ranks

from .runs import tiny

SECONDS = {"L": 1.0, "N": 5.0, HEAD: 1.0}


class Clock:
    """A mocked clock: each process is a little off, and notes what it was asked."""

    def __init__(self, rank: int) -> None:
        self.rank, self.asked = rank, dict[str, int]()

    def __call__(self, name: str, tokens: int, run: Run) -> float:
        run()  # a block of this kind does run
        self.asked[name] = tokens
        return SECONDS[name] * tokens * (1 - 0.001 * self.rank)


def cut(rank: int, world_size: int, config: TrainConfig) -> dict[str, Any]:
    runtime, clock = Runtime(rank, world_size, rank, device="cpu"), Clock(rank)
    model = LanguageModel(config.model)
    costs = measured_costs(config, model, runtime, clock)
    mesh = ParallelMesh(Degrees(pipeline=world_size), rank)
    found = {"costs": costs, "asked": clock.asked}
    for name, given in (("measured", costs), ("predicted", None)):
        pipeline = PipelineParallel(LanguageModel(config.model), Comm(mesh.pipeline_group), costs=given)
        found[name] = [len(span) for span in pipeline.spans]
    found["said"] = PipelineParallel(model, Comm(mesh.pipeline_group), costs=costs).describe()
    return found


def test_stages_are_cut_by_measured_time_alike_on_all_processes(tmp_path: Path) -> None:
    config = tiny(tmp_path, model={"num_layers": 6, "pattern": "NLLLLL"}, parallel={"pipeline_parallel_size": 2})
    ranks = run_ranks(cut, 2, config=config)
    for found in ranks:
        assert found["costs"] == ([5.0e9, *[1.0e9] * 5], 1.0e9), "nanoseconds a token of the slowest process, in two digits"
        assert found["asked"] == dict.fromkeys(SECONDS, 96)
        assert found["measured"] == [1, 5] != found["predicted"]
        assert "of the measured time" in found["said"][0]


def test_what_is_too_long_to_time_costs_as_its_flops_grow(tmp_path: Path) -> None:
    config = tiny(tmp_path, data={"seq_length": 16 * MOST})
    model = LanguageModel(config.model)
    linear, softmax = measured_costs(config, model, Runtime(device="cpu"), lambda name, tokens, run: float(tokens)).layers
    growth = [layer.flops_per_token(16 * MOST) / layer.flops_per_token(MOST) for layer in model.layers]  # type: ignore[operator]
    assert softmax / linear == pytest.approx(growth[1] / growth[0]) and growth[1] > 1.5


def test_a_split_by_hand_leaves_nothing_to_measure() -> None:
    with pytest.raises(UserError, match=r"pipeline_costs measured has no use beside parallel\.pipeline_split \[1, 1\]"):
        ParallelConfig(pipeline_costs="measured", pipeline_split=(1, 1))
