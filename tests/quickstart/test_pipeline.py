"""Whole runs with layers divided over processes: signals, checkpoints and refusals of the trainer.

That the steps are those of one process, under every schedule and beside other axes, is in tests/verify/test_topologies.py.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from longhaul.launcher.config import TrainConfig
from longhaul.launcher.trainer import Trainer
from longhaul.models.errors import UserError
from longhaul.parallel.runtime import Runtime
from tests.harness import run_ranks
from tests.harness.numerics import assert_close
from tests.launcher.runs import MODEL, tiny, train_rank, whole_parameters, write_corpus

STEPS = 10
FOUR_LAYERS = replace(MODEL, num_layers=4, pattern="LLLN")


def job(folder: Path, name: str, **sections: dict[str, Any]) -> TrainConfig:
    """Some steps of plain SGD on four streams each."""
    options = {
        "optimizer": {"name": "sgd", "lr": 0.1, "min_lr": 0.0, "clip": 0.0, "schedule": "constant", "warmup_steps": 0},
        "train": {"steps": STEPS, "global_batch_size": 4, "eval_every": STEPS // 2, **sections.pop("train", {})},
        "checkpoint": {"folder": str(folder / name), "every": STEPS // 2, **sections.pop("checkpoint", {})},
    }
    return replace(tiny(folder, **options, **sections), model=FOUR_LAYERS)


def outcome(rank: int, world_size: int, config: TrainConfig) -> dict[str, Any]:
    trainer = Trainer(config, Runtime(rank, world_size, device="cpu"))
    step, norms, losses = trainer.stepper.train, [], []

    def noted(streams: Any, rate: float) -> Any:
        result = step(streams, rate)
        norms.append(result.gradient_norm)
        losses.append(result.loss)
        return result

    trainer.stepper.train = noted  # type: ignore[method-assign]
    with mock.patch("longhaul.launcher.trainer.write_results"):
        result = trainer.run()
    return {
        "norms": norms,
        "losses": losses,
        "held_out": result.held_out_loss,
        "parameters": whole_parameters(trainer.model.model),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def one_process(folder: Path) -> dict[str, Any]:
    return outcome(0, 1, job(folder, "one"))


def assert_same(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    names: set[str] = set()
    for rank, result in enumerate(found):
        for what in ("norms", "losses"):
            numbers = (torch.tensor(values[what]) for values in (result, expected))
            assert_close(*numbers, f"{what} on rank {rank}")
        assert result["held_out"] == pytest.approx(expected["held_out"], rel=1e-5)
        for name, parameter in result["parameters"].items():
            assert_close(parameter, expected["parameters"][name], f"{name} after {STEPS} steps on rank {rank}")
        names |= set(result["parameters"])
    assert names == set(expected["parameters"])


def test_a_stopped_run_goes_on_and_on_one_process_too(folder: Path, one_process: dict[str, Any]) -> None:
    options = {"parallel": {"pipeline_parallel_size": 2, "data_parallel_size": 1}}
    config = job(folder, "stopped", **options)
    half = [result[0] for result in run_ranks(train_rank, 2, config=config, stop_at=STEPS // 2)]
    assert [(result.step, result.stop_signal) for result in half] == [(STEPS // 2, 15)] * 2
    alone = job(folder, "alone", checkpoint={"resume": str(folder / "stopped" / f"step_{STEPS // 2}")})
    for found in (run_ranks(outcome, 2, config=config), [outcome(0, 1, alone)]):
        for result in found:
            assert len(result["losses"]) == STEPS // 2
        assert one_process["losses"][-1] < one_process["losses"][0] - 0.1, "the comparison saw no training"
        expected = {**one_process, **{name: one_process[name][STEPS // 2 :] for name in ("norms", "losses")}}
        assert_same(found, expected)


REFUSED = [
    ({"data": {"carry_state": True}}, "data.carry_state cannot go with parallel.pipeline_parallel_size 2"),
    ({"train": {"stream_tokens": 16}}, "train.stream_tokens cannot go with parallel.pipeline_parallel_size 2"),
    ({"train": {"global_batch_size": 1}}, "needs 2 streams for each data-parallel group, but .* gives 1"),
    ({"parallel": {"pipeline_schedule": "interleaved_1f1b"}, "train": {"global_batch_size": 5}}, "runs rounds of equal size"),
    ({"parallel": {"pipeline_schedule": "dualpipev", "pipeline_stages_per_rank": 3}}, "has two stages a process"),
    ({"parallel": {"pipeline_stages_per_rank": 2}}, "1f1b has one stage a process"),
    ({"parallel": {"pipeline_split": (3, 2)}}, r"pipeline_split \[3, 2\] must give each of 2 stages"),
    ({"parallel": {"pipeline_schedule": "looped_bfs", "pipeline_stages_per_rank": 3}}, "needs 6 layers, but"),
]


def refusal(rank: int, world_size: int, config: TrainConfig) -> str:
    try:
        Trainer(config, Runtime(rank, world_size, device="cpu"))
    except UserError as error:
        return str(error)
    return ""


def refusals(rank: int, world_size: int, configs: list[TrainConfig]) -> list[str]:
    return [refusal(rank, world_size, config) for config in configs]


def test_what_does_not_fit_is_refused_before_the_first_step(folder: Path) -> None:
    configs = []
    for index, (sections, _) in enumerate(REFUSED):
        parallel = {"pipeline_parallel_size": 2, "data_parallel_size": 1, **sections.get("parallel", {})}
        configs.append(job(folder, f"refused{index}", **{**sections, "parallel": parallel}))
    for messages in run_ranks(refusals, 2, configs=configs):
        for message, (_, expected) in zip(messages, REFUSED, strict=True):
            assert re.search(expected, message), (message, expected)
