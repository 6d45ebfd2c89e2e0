"""Planned jobs of the trainer, kept small: long-tailed documents, gradients of the first step, parameters after the last."""

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from longhaul.launcher.parsing import parse
from longhaul.launcher.trainer import Trainer
from longhaul.parallel.comm import Comm
from longhaul.parallel.network import Network
from longhaul.parallel.runtime import Runtime
from longhaul.parallel.tensor import local_ranges
from tests.launcher.runs import whole

MEMORY = 120  # tokens of a rank; the longest documents need four
RATES = {"linear": 1e-9, "quadratic": 1e-9, "bias": 1e-3}  # of a slow processor, so that tiny layers have times to plan with
# Plain SGD: what AdamW would hide shows.
SGD = {"optimizer.name": "sgd", "optimizer.lr": 0.05, "optimizer.min_lr": 0, "optimizer.clip": 0, "optimizer.warmup_steps": 0}
BASE = {
    "data.seq_length": 360, "data.validation_fraction": 0, "train.steps": 20, "train.global_batch_size": 2,
    "model.initializer_range": 0.1, "model.hidden_size": 16, "model.num_layers": 2, "model.num_heads": 2, "model.pattern": "L",
    "optimizer.schedule": "constant", "checkpoint.every": 0, "metrics.display": "none", "train.device": "cpu", **SGD,
}  # fmt: skip
PLANNED = {"parallel.planner.enabled": True, "parallel.planner.memory_tokens": MEMORY, "parallel.planner.learn": False}


def write_documents(folder: Path, seed: int = 3) -> Path:
    """Most documents short, a few as long as a stream."""
    random = np.random.default_rng(seed)
    lengths = np.exp(random.normal(2.7, 1.0, 160)).astype(int) + 2
    lengths[::40] = 300
    folder.mkdir(parents=True)
    for index, length in enumerate(lengths):
        text = "".join(random.choice(list("the quick brown fox "), length))
        (folder / f"{index:03}.txt").write_text(text)
    kinds = ("linear_attention", "mamba2", "gated_deltanet", "mom", "memmamba", "jrt", "attention", "dense", "head")
    calibration = {"schema": 1, "rates": dict.fromkeys(kinds, RATES)}
    (folder.parent / "calibration.json").write_text(json.dumps(calibration))
    return folder


def arguments(folder: Path, values: dict[str, Any]) -> list[str]:
    """Flags of a run in `folder`, whose documents are in its folder `corpus`."""
    fixed = {"data.paths": f"[{folder / 'corpus'}]", "data.cache_dir": folder / "cache", "checkpoint.folder": folder / "run"}
    found = {**fixed, **BASE, **values}
    if values.get("parallel.planner.enabled"):
        found["parallel.planner.calibration"] = folder / "calibration.json"
    return [each for key, value in found.items() for each in (f"--{key}", _text(value))]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _steady(comm: Comm, device: Any) -> Network:
    """Links that are the same on every machine and under every load, so that plans are."""
    return Network.even(comm.size, 1e-4, 1e9)


def job(
    rank: int, world_size: int, argv: Sequence[str], dtype: torch.dtype = torch.float32, clock: Any = None
) -> dict[str, Any]:
    """Run on one rank; what it saw: gradients of step 1, parameters, losses, and the plans if there were any."""
    steady = mock.patch("longhaul.launcher.planned.inputs.probe", _steady)
    with contextlib.redirect_stdout(io.StringIO()), mock.patch("longhaul.launcher.trainer.write_results"), steady:
        torch.set_default_dtype(dtype)
        try:
            trainer = Trainer(parse(list(argv)), Runtime(rank, world_size, rank, device="cpu", timeout=120.0))
            if clock is not None and trainer.planned is not None:
                trainer.planned.clock, trainer.planned.equal_work = clock, lambda: 1e-3 * (1 + (rank == 1))
            return _observed(trainer)
        finally:
            torch.set_default_dtype(torch.float32)


def full(trainer: Trainer, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A parameter of this name, or its gradient, put together from shards, and from what ranks hold of experts and heads."""
    found = whole(tensor)
    for cut in (trainer.model.experts, trainer.model.tensor):
        kept = cut.kept.get(name)
        if kept is not None:
            parts = found.new_zeros(kept.shape)
            for view, held in local_ranges(found, kept):
                assert held is not None
                parts.narrow(kept.axis, held.start, held.stop - held.start).copy_(view / held.sharing)
            found = cut.comm.all_reduce(parts, "test").wait()
    return found


def _observed(trainer: Trainer) -> dict[str, Any]:
    first: dict[str, torch.Tensor] = {}
    losses, plans, said, continued = [], [], [], []
    planned = trainer.planned
    clip, step = trainer.model.clip_gradients, trainer.stepper.train

    def keep_gradients(largest: float) -> torch.Tensor:
        if not first:
            first.update({name: full(trainer, name, p.grad) for name, p in trainer.model.model.named_parameters()})
        return clip(largest)

    def keep_results(streams: Any, rate: float) -> Any:
        if planned is not None:
            plans.append(planned.step.plan)  # type: ignore[union-attr]
            continued.append([index for index, position in enumerate(planned.step.positions) if position])  # type: ignore[union-attr]
        result = step(streams, rate)
        losses.append(result.loss)
        said.append(dict(result.extra))
        return result

    trainer.model.clip_gradients, trainer.stepper.train = keep_gradients, keep_results
    outcome = trainer.run()
    parameters = {name: full(trainer, name, p) for name, p in trainer.model.model.named_parameters()}
    return {
        "first": first, "parameters": parameters, "losses": losses, "plans": plans, "said": said,
        "held_out": outcome.held_out_loss, "continued": continued,
    }  # fmt: skip
