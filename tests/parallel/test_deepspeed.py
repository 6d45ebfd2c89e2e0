"""DeepSpeed's ZeRO drives the same model to the same weights, and its checkpoints are anybody's."""

import importlib.util
import os
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from longhaul.launcher.batches import stream_indices
from longhaul.launcher.config import ParallelConfig
from longhaul.launcher.step import Stepper
from longhaul.launcher.trainer import Trainer
from longhaul.models.errors import UserError
from longhaul.models.mixers.mamba2 import Mamba2Config
from longhaul.parallel.comm import Comm
from longhaul.parallel.data import DataParallel
from longhaul.parallel.deepspeed import ZeroParallel
from longhaul.parallel.engine import SequenceParallel
from longhaul.parallel.mesh import Degrees, ParallelMesh
from longhaul.parallel.runtime import Runtime
from tests.harness import run_ranks
from tests.harness.numerics import assert_close, assert_trees_close
from tests.launcher.runs import tiny, train_rank, whole_parameters, write_corpus
from tests.launcher.test_loss import BATCH, RATE, STEPS, model, oracle, streams

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install 'longhaul[deepspeed]'"
)


def whole(zero: ZeroParallel) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(p).clone() for name, p in zero.model.named_parameters()}


def prepared(
    rank: int, world_size: int, degrees: Degrees, stage: int, offload: bool = False, recompute: str = "none", **options: Any
) -> tuple[DataParallel, Stepper]:
    """The model of `test_loss` in float32 and what steps it: ZeRO, or FSDP2 (stage 0)."""
    os.environ.setdefault("LOCAL_RANK", str(rank))
    runtime, mesh = Runtime(rank, world_size, device="cpu"), ParallelMesh(degrees, rank)
    lm = model().float()
    lm.activation_checkpointing = recompute
    parallel = ZeroParallel(lm, mesh, stage, offload) if stage else DataParallel(lm, mesh, "fsdp", blocks=tuple(lm.layers))
    optimizer = torch.optim.SGD(lm.parameters(), lr=1.0)
    parallel.drive(optimizer)
    return parallel, Stepper(parallel, SequenceParallel(Comm(mesh.sequence_group)), runtime, optimizer, **options)


class Case(NamedTuple):
    data: int
    sequence: int
    stage: int
    offload: bool
    recompute: str
    stream_tokens: int | None


CASES = [
    Case(2, 1, 1, False, "none", None),
    Case(1, 2, 2, False, "selective", None),
    Case(1, 2, 3, False, "full", None),
    Case(2, 1, 3, True, "none", None),
    Case(1, 2, 1, True, "full", 16),
    Case(2, 1, 2, True, "none", 16),
    Case(2, 2, 1, False, "none", None),
    Case(2, 2, 2, False, "none", 16),
    Case(2, 2, 3, False, "none", 16),
]


def steps(rank: int, world_size: int, case: Case) -> dict[str, Any]:
    """The steps of `test_loss.oracle`: several micro-batches each, some tokens masked."""
    degrees = Degrees(data=case.data, sequence=case.sequence)
    zero, stepper = prepared(
        rank, world_size, degrees, case.stage, case.offload, case.recompute, clip=0.1, stream_tokens=case.stream_tokens
    )
    samples, losses, norms = streams("tail"), [], []
    for step in range(STEPS):
        chosen = stream_indices(step * BATCH, BATCH, rank // case.sequence, case.data)
        result = stepper.train([samples[index] for index in chosen], RATE)
        losses.append(result.loss)
        norms.append(result.gradient_norm)
    return {"losses": losses, "norms": norms, "parameters": whole(zero)}


def small_steps(rank: int, world_size: int, stage: int, count: int, rate: float) -> dict[str, Any]:
    """Steps with bf16 products on the same streams, over two data ranks, so that both backends round at the same places."""
    parallel, stepper = prepared(rank, world_size, Degrees(data=2), stage, precision="bf16")
    samples = [streams("some")[index] for index in stream_indices(0, BATCH, rank, 2)]
    found = [stepper.train(samples, rate) for _ in range(count)]
    parameters = whole(parallel) if stage else whole_parameters(parallel.model)
    return {"losses": [f.loss for f in found], "norms": [f.gradient_norm for f in found], "parameters": parameters}


def run(rank: int, world_size: int, config: Any, stop_at: int = 0) -> None:
    runtime = Runtime(rank, world_size, rank, device="cpu", timeout=30.0)
    trainer: Trainer | None = None

    def signal() -> int:
        return 15 if stop_at and trainer is not None and trainer.step + 1 >= stop_at else 0

    trainer = Trainer(config, runtime, signal)
    assert isinstance(trainer.model, ZeroParallel) == (config.parallel.data_parallel_backend == "deepspeed")
    with mock.patch("longhaul.launcher.trainer.write_results"):
        trainer.run()


COUNT, LITTLE = 6, 2e-3


def everything(rank: int, world_size: int, configs: list[tuple[Any, int]]) -> dict[Any, Any]:
    """All that ranks of one number do here: DeepSpeed takes seconds to import."""
    found: dict[Any, Any] = {case: steps(rank, world_size, case) for case in CASES if case.data * case.sequence == world_size}
    if world_size == 2:
        for stage in (0, 1, 2, 3):
            found["one", stage] = small_steps(rank, world_size, stage, 1, RATE)
            found["little", stage] = small_steps(rank, world_size, stage, COUNT, LITTLE)
    for config, stop_at in configs:
        run(rank, world_size, config, stop_at)
    return found


class Road(NamedTuple):
    """Steps 1 and 2 under fsdp on two ranks, 3 and 4 under ZeRO, 5 and 6 in one process."""

    stage: int
    ranks: int
    offload: bool
    optimizer: str

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            data_parallel_backend="deepspeed",
            zero_stage=self.stage,
            zero_offload=self.offload,
            sequence_parallel_size=1 if self.stage == 2 else 2,  # a forward then comes before the weights are restored
        )


ROADS = [Road(1, 2, True, "adamw"), Road(2, 2, False, "sgd"), Road(3, 4, False, "adamw")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero")


def config(folder: Path, road: Road | str) -> Any:
    """Of a road, or of a run with the optimizer of that name on one process."""
    optimizer, name = (road, "whole") if isinstance(road, str) else (road.optimizer, f"stage{road.stage}")
    sections: dict[str, Any] = {"checkpoint": {"folder": str(folder / f"{name}_{optimizer}")}, "optimizer": {"name": optimizer}}
    # Two heads of Mamba-2: parameters of two numbers, of which some of four ranks hold nothing.
    mamba2 = {"linear_mixer": "mamba2", "mamba2": Mamba2Config(state_size=6, head_dim=16, num_groups=1, chunk=8)}
    return tiny(folder, model=mamba2, train={"global_batch_size": 6}, **sections)


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[int, list[dict[Any, Any]]]:
    """What two and four ranks found; in `folder` the checkpoints of steps 4."""
    write_corpus(folder / "corpus")
    found = {}
    for ranks in (2, 4):
        configs = []
        if ranks == 2:
            configs += [(config(folder, road), 2) for road in ROADS]
        configs += [(replace(config(folder, road), parallel=road.parallel), 4) for road in ROADS if road.ranks == ranks]
        found[ranks] = run_ranks(everything, ranks, configs=configs, timeout=240)
    return found


@needs_deepspeed
@pytest.mark.parametrize("case", CASES)
def test_zero_takes_the_steps_of_one_process(case: Case, results: dict[int, list[dict[Any, Any]]]) -> None:
    expected = expected_steps()
    for rank, each in enumerate(results[case.data * case.sequence]):
        found = each[case]
        for name in ("losses", "norms"):
            numbers = (torch.tensor(values[name], dtype=torch.float64) for values in (found, expected))
            assert_close(*numbers, f"{name} on rank {rank}", dtype=torch.float32)
        assert_trees_close(found["parameters"], expected["parameters"], f"parameters on rank {rank}")


@cache
def expected_steps() -> dict[str, Any]:
    return oracle("tail", 0.1)


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_with_bf16_products_is_that_of_fsdp(stage: int, results: dict[int, list[dict[Any, Any]]]) -> None:
    """Forwards and backwards are the same to the bit; sums over streams are float32's, in another order."""
    for rank, each in enumerate(results[2]):
        found, expected = each["one", stage], each["one", 0]
        assert found["losses"] == expected["losses"]
        assert_close(torch.tensor(found["norms"]), torch.tensor(expected["norms"]), f"norm on rank {rank}")
        assert_trees_close(found["parameters"], expected["parameters"], f"parameters on rank {rank}")


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_steps_smaller_than_bf16_can_tell_add_up(stage: int, results: dict[int, list[dict[Any, Any]]]) -> None:
    """Weights are float32 under bf16 products: in bf16 a step of less than half a unit in the last place would be lost."""
    start = {name: parameter.detach().float() for name, parameter in model().named_parameters()}
    lost = total = 0
    for rank, each in enumerate(results[2]):
        found, expected = each["little", stage]["parameters"], each["little", 0]["parameters"]
        for name, before in start.items():
            value, moved = found[name], expected[name] - before
            assert value.dtype == torch.float32
            # A step rounds once in each backend; what it subtracts differs by float32's sums.
            bound = COUNT * torch.finfo(torch.float32).eps * before.abs().max() + 1e-5 * moved.abs().max()
            assert (value - expected[name]).abs().max() <= bound, f"{name} on rank {rank}"
            unit = torch.finfo(torch.bfloat16).eps * before.abs()
            small = (moved.abs() < COUNT * unit / 4) & (moved.abs() > 10 * bound)  # a step is less than a quarter of a unit
            lost += int(small.sum())
            total += value.numel()
    assert lost > total / 2, "steps in bf16 would have been the same"


@needs_deepspeed
@pytest.mark.parametrize("road", ROADS)
def test_a_run_goes_on_under_another_backend(road: Road, folder: Path, results: dict[int, list[dict[Any, Any]]]) -> None:
    """As if one process had done all its steps."""
    assert results
    outcome, found = train_rank(0, 1, config(folder, road))
    assert outcome.step == 6
    assert_trees_close(found, uninterrupted(folder, road.optimizer), "parameters")


@cache
def uninterrupted(folder: Path, optimizer: str) -> dict[str, torch.Tensor]:
    return train_rank(0, 1, config(folder, optimizer))[1]


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UserError, match=r"zero_stage is 4: give 1, 2 or 3"):
        ParallelConfig(data_parallel_backend="deepspeed", zero_stage=4)
    with pytest.raises(UserError, match=r"zero_stage 3 and zero_offload false need .* deepspeed, not fsdp"):
        ParallelConfig(zero_stage=3)
    for name in ("expert", "tensor", "pipeline"):
        sizes: Any = {f"{name}_parallel_size": 2}
        with pytest.raises(UserError, match=rf"deepspeed works with parallel.{name}_parallel_size 1, not 2: .* use fsdp"):
            ParallelConfig(data_parallel_backend="deepspeed", **sizes)
    with pytest.raises(UserError, match=r"parameter_dtype bf16 needs parallel.data_parallel_backend fsdp, not deepspeed"):
        ParallelConfig(data_parallel_backend="deepspeed", parameter_dtype="bf16")


def test_without_deepspeed_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match="expert_parallel_size 1, not 2"):  # whether it is installed or not
        ParallelConfig(data_parallel_backend="deepspeed", expert_parallel_size=2)
    with pytest.raises(UserError, match=r"needs DeepSpeed, which cannot be imported .* pip install 'longhaul\[deepspeed\]'"):
        ZeroParallel(model(), ParallelMesh(Degrees()))
