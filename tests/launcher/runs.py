"""Tiny runs for the tests of the launcher: a corpus, a configuration, a rank's part of a job."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.distributed.tensor import DTensor

from longhaul.launcher.config import CheckpointConfig, OptimizerConfig, ParallelConfig, TrainConfig, TrainingConfig
from longhaul.launcher.data import DataConfig
from longhaul.launcher.metrics import MetricsConfig
from longhaul.launcher.trainer import Outcome, Trainer
from longhaul.models.config import ModelConfig
from longhaul.parallel.runtime import Runtime

MODEL = ModelConfig(hidden_size=16, num_layers=2, num_heads=2, pattern="LN", linear_mixer="linear_attention")


def write_corpus(folder: Path, documents: int = 24) -> Path:
    """Text files of awkward lengths, some longer than a stream."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(documents):
        (folder / f"{index}.txt").write_text(f"{index}: to be or not to be. " * (1 + index * index % 17))
    return folder


def tiny(folder: Path, **sections: dict[str, Any]) -> TrainConfig:
    """A run that takes a second: folder/corpus in, folder/run out. `train={"steps": 4}` changes a section."""
    base = TrainConfig(
        model=MODEL,
        data=DataConfig(
            paths=(str(folder / "corpus"),),
            seq_length=96,
            validation_fraction=0.2,
            validation_tokens=200,
            cache_dir=str(folder / "cache"),
        ),
        parallel=ParallelConfig(),
        optimizer=OptimizerConfig(warmup_steps=2, lr=1e-2, min_lr=1e-3),
        train=TrainingConfig(steps=6, timeout=30.0, device="cpu"),
        checkpoint=CheckpointConfig(folder=str(folder / "run"), every=3),
        metrics=MetricsConfig(display="none"),
    )
    return replace(base, **{name: replace(getattr(base, name), **values) for name, values in sections.items()})


def train_rank(
    rank: int, world_size: int, config: TrainConfig, stop_at: int = 0, report: bool = False
) -> tuple[Outcome, dict[str, torch.Tensor]]:
    """Run a job on this rank; SIGTERM is pretended at step `stop_at`. Returns the whole parameters."""
    runtime = Runtime(rank, world_size, rank, device="cpu", timeout=30.0)
    trainer: Trainer | None = None

    def signal() -> int:
        # Asked inside the step, which is counted after it. Only one rank is told: the others must hear of it.
        return 15 if stop_at and trainer is not None and trainer.step + 1 >= stop_at and rank == world_size - 1 else 0

    trainer = Trainer(config, runtime, signal)
    with contextlib.nullcontext() if report else mock.patch("longhaul.launcher.trainer.write_results"):
        outcome = trainer.run()
    return outcome, whole_parameters(trainer.model.model)


def whole_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters, gathered where they are sharded."""
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
