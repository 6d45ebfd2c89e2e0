"""DeepSpeed's ZeRO drives the same model to the same weights, and its checkpoints are anybody's."""

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from longhaul.launcher.batches import stream_indices
from longhaul.launcher.config import ParallelConfig
from longhaul.launcher.step import Stepper
from longhaul.launcher.trainer import Trainer
from longhaul.models.errors import UserError
from longhaul.parallel.comm import Comm
from longhaul.parallel.deepspeed import ZeroParallel
from longhaul.parallel.engine import SequenceParallel
from longhaul.parallel.mesh import Degrees, ParallelMesh
from longhaul.parallel.runtime import Runtime
from tests.harness import run_ranks
from tests.harness.numerics import assert_close, assert_trees_close
from tests.launcher.runs import tiny, train_rank, write_corpus
from tests.launcher.test_loss import BATCH, RATE, STEPS, model, oracle, streams

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install 'longhaul[deepspeed]'"
)


def whole(zero: ZeroParallel) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(p).clone() for name, p in zero.model.named_parameters()}


def steps(
    rank: int, world_size: int, degrees: Degrees, stage: int, offload: bool, recompute: str, stream_tokens: int | None
) -> dict[str, Any]:
    """The steps of `test_loss.oracle` in float32: several micro-batches each, some tokens masked."""
    os.environ.setdefault("LOCAL_RANK", str(rank))
    runtime, mesh = Runtime(rank, world_size, device="cpu"), ParallelMesh(degrees, rank)
    lm = model().float()
    lm.activation_checkpointing = recompute
    zero = ZeroParallel(lm, mesh, stage, offload)
    optimizer = torch.optim.SGD(lm.parameters(), lr=1.0)
    zero.drive(optimizer)
    engine = SequenceParallel(Comm(mesh.sequence_group))
    stepper = Stepper(zero, engine, runtime, optimizer, clip=0.1, stream_tokens=stream_tokens)
    samples, losses, norms = streams("tail"), [], []
    for step in range(STEPS):
        chosen = stream_indices(step * BATCH, BATCH, mesh.data_rank, degrees.data)
        result = stepper.train([samples[index] for index in chosen], RATE)
        losses.append(result.loss)
        norms.append(result.gradient_norm)
    return {"losses": losses, "norms": norms, "parameters": whole(zero)}


CASES = [  # data, sequence, stage, offload, recomputation, tokens of a chunk
    (2, 1, 1, False, "none", None),
    (1, 2, 2, False, "selective", None),
    (1, 2, 3, False, "full", None),
    (2, 1, 3, True, "none", None),
    (1, 2, 1, True, "full", 16),
    (2, 1, 2, True, "none", 16),
    (2, 2, 1, False, "none", None),
    (2, 2, 2, False, "none", 16),
    (2, 2, 3, False, "none", 16),
]


@needs_deepspeed
@pytest.mark.parametrize(("data", "sequence", "stage", "offload", "recompute", "stream_tokens"), CASES)
def test_zero_takes_the_steps_of_one_process(
    data: int, sequence: int, stage: int, offload: bool, recompute: str, stream_tokens: int | None
) -> None:
    degrees, expected = Degrees(data=data, sequence=sequence), oracle("tail", 0.1)
    arguments: Any = {"stage": stage, "offload": offload, "recompute": recompute, "stream_tokens": stream_tokens}
    for rank, found in enumerate(run_ranks(steps, degrees.world_size, degrees=degrees, timeout=120, **arguments)):
        for name in ("losses", "norms"):
            numbers = (torch.tensor(values[name], dtype=torch.float64) for values in (found, expected))
            assert_close(*numbers, f"{name} on rank {rank}", dtype=torch.float32)
        assert_trees_close(found["parameters"], expected["parameters"], f"parameters on rank {rank}")


def run(rank: int, world_size: int, config: Any, stop_at: int = 0) -> dict[str, torch.Tensor]:
    runtime = Runtime(rank, world_size, rank, device="cpu", timeout=30.0)
    trainer: Trainer | None = None

    def signal() -> int:
        return 15 if stop_at and trainer is not None and trainer.step + 1 >= stop_at else 0

    trainer = Trainer(config, runtime, signal)
    assert isinstance(trainer.model, ZeroParallel)
    with mock.patch("longhaul.launcher.trainer.write_results"):
        trainer.run()
    return whole(trainer.model)


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "ranks", "offload", "optimizer"), [(1, 2, True, "adamw"), (2, 2, False, "sgd"), (3, 3, False, "adamw")]
)
def test_a_run_goes_on_under_another_backend(stage: int, ranks: int, offload: bool, optimizer: str, tmp_path: Path) -> None:
    """Steps 1 and 2 under fsdp, 3 and 4 under ZeRO, 5 and 6 in one process: as if one had done them all."""
    write_corpus(tmp_path / "corpus")

    def config(name: str) -> Any:
        sections: dict[str, Any] = {"checkpoint": {"folder": str(tmp_path / name)}, "optimizer": {"name": optimizer}}
        return tiny(tmp_path, train={"global_batch_size": 6}, **sections)

    plain = config("run")
    deepspeed = ParallelConfig(data_parallel_backend="deepspeed", zero_stage=stage, zero_offload=offload)
    run_ranks(train_rank, 2, config=plain, stop_at=2)
    run_ranks(run, ranks, config=replace(plain, parallel=deepspeed), stop_at=4, timeout=120)
    outcome, found = train_rank(0, 1, plain)
    assert outcome.step == 6
    _, expected = train_rank(0, 1, config("whole"))
    assert_trees_close(found, expected, "parameters")


def test_what_makes_no_sense_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"zero_stage is 4: give 1, 2 or 3"):
        ParallelConfig(data_parallel_backend="deepspeed", zero_stage=4)
    with pytest.raises(UserError, match=r"zero_stage 3 and zero_offload false need .* deepspeed, not fsdp"):
        ParallelConfig(zero_stage=3)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"needs DeepSpeed, which cannot be imported .* pip install 'longhaul\[deepspeed\]'"):
        ZeroParallel(model(), ParallelMesh(Degrees()))
