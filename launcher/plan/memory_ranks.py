"""What a run's processes hold: its first steps, run on this machine with every allocation recorded."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from longhaul.launcher.batches import stream_indices
from longhaul.launcher.config import TrainConfig
from longhaul.launcher.trainer import Trainer
from longhaul.parallel.runtime import Runtime

from .allocations import recorded

STEPS = 2  # the first finds no optimizer states


def measure(runtime: Runtime, config: TrainConfig) -> dict[str, Any]:
    """`setup` and `peak`: the most bytes of tensors on this process until its first step, and until the end of the last.

    `place` is the process's in its pipeline.
    """
    folder = Path(runtime.on_main(lambda: tempfile.mkdtemp(prefix="longhaul-memory-")))
    config = replace(config, checkpoint=replace(config.checkpoint, folder=str(folder / "run"), every=0, resume="never"))
    try:
        with recorded() as setup:
            trainer = Trainer(config, runtime)
        with recorded() as steps:
            train(trainer, STEPS)
    finally:
        if runtime.is_main:
            shutil.rmtree(folder, ignore_errors=True)
    place = trainer.mesh.coordinates["pipeline"]
    return {"setup": setup.peak, "peak": max(setup.peak, setup.left + steps.peak), "place": place}


def train(trainer: Trainer, steps: int) -> None:
    """Steps, and nothing beside them."""
    config = trainer.config
    batch = config.train.global_batch_size
    assert batch is not None, "resolved"
    for step in range(steps):
        indices = stream_indices(step * batch, batch, trainer.mesh.data_rank, trainer.mesh.degrees.data)
        trainer.stepper.train([trainer.data.train.stream(index) for index in indices], config.optimizer.lr)
