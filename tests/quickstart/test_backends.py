"""The main job under every way to hold less: the same norms and weights as one process that holds everything."""

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from longhaul.launcher.parsing import parse
from longhaul.launcher.trainer import Trainer
from longhaul.parallel.deepspeed import ZeroParallel
from longhaul.parallel.runtime import Runtime
from tests.harness.numerics import assert_close
from tests.harness.pool import run_ranks
from tests.launcher.runs import whole

from .test_topologies import PLAIN_SGD, QUICKSTART

NEEDS_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
BACKENDS = [
    pytest.param(
        "fsdp", ["--parallel.data_parallel_replicate_size", "2", "--train.activation_checkpointing", "selective"], id="hsdp"
    ),
    pytest.param("ddp", ["--train.activation_checkpointing", "selective", "--train.activation_offload", "true"], id="ddp"),
    pytest.param("deepspeed", ["--parallel.zero_stage", "2"], id="zero2", marks=NEEDS_DEEPSPEED),
    pytest.param(
        "deepspeed",
        ["--parallel.zero_stage", "3", "--parallel.zero_offload", "true", "--train.activation_checkpointing", "full"],
        id="zero3",
        marks=NEEDS_DEEPSPEED,
    ),
]


def job(rank: int, world_size: int, folder: str, overrides: list[str]) -> dict[str, Any]:
    """A few steps of the quickstart on short streams: norms, losses and whole weights."""
    arguments = ["--config", str(QUICKSTART), "--checkpoint.folder", folder, "--checkpoint.every", "0"]
    arguments += ["--data.seq_length", "509", "--data.validation_tokens", "2000", "--train.global_batch_size", "4"]
    arguments += ["--train.steps", "3", "--optimizer.schedule", "constant", "--optimizer.warmup_steps", "0"]
    arguments += ["--metrics.tensorboard", "false", *PLAIN_SGD, *overrides]
    norms, losses = [], []
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(parse(arguments), Runtime(rank, world_size, rank, device="cpu"))
        step = trainer.stepper.train

        def note(streams: Any, rate: float) -> Any:
            result = step(streams, rate)
            norms.append(result.gradient_norm)
            losses.append(result.loss)
            return result

        trainer.stepper.train = note  # type: ignore[method-assign]
        trainer.run()
    if isinstance(trainer.model, ZeroParallel):
        from deepspeed.utils import safe_get_full_fp32_param as full_of
    else:
        full_of = whole
    parameters = {name: full_of(p).clone() for name, p in trainer.model.model.named_parameters()}
    return {"norms": torch.tensor(norms), "losses": torch.tensor(losses), "parameters": parameters}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    alone = ["--parallel.sequence_parallel_size", "1"]
    return run_ranks(job, 1, timeout=120, folder=str(tmp_path_factory.mktemp("reference")), overrides=alone)[0]


@pytest.mark.parametrize(("backend", "overrides"), BACKENDS)
def test_the_main_job_under_a_backend(backend: str, overrides: list[str], one_process: dict[str, Any], tmp_path: Path) -> None:
    degrees = ["--parallel.data_parallel_size", "2", "--parallel.sequence_parallel_size", "2"]
    arguments = [*degrees, "--parallel.data_parallel_backend", backend, *overrides]
    for found in run_ranks(job, 4, timeout=180, folder=str(tmp_path), overrides=arguments):
        for name in ("norms", "losses"):
            assert_close(found[name], one_process[name], name)
        for name, parameter in one_process["parameters"].items():
            assert_close(found["parameters"][name], parameter, name)
