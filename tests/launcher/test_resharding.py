"""A run saved on one topology goes on on any other, tensor parallelism included, as if nothing had happened."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longhaul.launcher.config import TrainConfig
from longhaul.launcher.state import optimizer_tensors
from longhaul.launcher.trainer import Trainer
from longhaul.models.config import ModelConfig
from longhaul.models.errors import UserError
from longhaul.parallel.checkpoint import find, load, tensor_shapes
from longhaul.parallel.runtime import Runtime
from longhaul.parallel.tensor import local_ranges
from tests.harness import run_ranks
from tests.harness.numerics import assert_bitwise_equal

from .runs import tiny, whole, write_corpus

STEPS, CUT = 4, 2
MODEL: dict[str, Any] = {
    "linear_mixer": "mamba2",  # a projection of five runs, whose one group is shared by all owners of heads
    "mamba2": replace(ModelConfig().mamba2, state_size=4, head_dim=8),
    "num_kv_heads": 1,
    "tie_embeddings": True,
}
# Processes, tensor and sequence parallel sizes; what is left over is data parallel.
TP2_SP2, SP1, DP2, DP3, TP2 = (4, 2, 2), (1, 1, 1), (2, 1, 1), (3, 1, 1), (2, 2, 1)


def configured(
    folder: Path, topology: tuple[int, int, int], run: str, steps: int, model: dict[str, Any] = MODEL, **parallel: Any
) -> TrainConfig:
    _, tensor, sequence = topology
    return tiny(
        folder,
        model=model,
        parallel={"tensor_parallel_size": tensor, "sequence_parallel_size": sequence, **parallel},
        # The rate stays, whatever the number of steps; Adam divides by gradients' sizes, so the smallest are noise without eps.
        optimizer={"schedule": "constant", "warmup_steps": 0, "eps": 1e-4},
        train={"steps": steps, "global_batch_size": 6},
        checkpoint={"folder": str(folder / run)},
    )


def train_rank(rank: int, world_size: int, config: TrainConfig) -> dict[str, Any]:
    """Run a job; what this rank holds of every tensor, as (axis, start, stop) and values, when it begins and when it ends."""
    trainer = Trainer(config, Runtime(rank, world_size, rank, device="cpu", timeout=30.0))
    before = held(trainer)
    trainer.run()
    return {"before": before, "after": held(trainer)}


def held(trainer: Trainer) -> dict[str, list[tuple[Any, torch.Tensor]]]:
    model, kept = trainer.model.model, {**trainer.model.tensor.kept, **trainer.model.experts.kept}
    tensors = {f"model.{name}": whole(tensor) for name, tensor in model.state_dict().items()}
    tensors.update({name: whole(tensor) for name, tensor in optimizer_tensors(model, trainer.optimizer).items()})
    found = {}
    for name, tensor in tensors.items():
        parameter = name.partition(".")[2] if name.startswith("model.") else name.partition(".")[2].rpartition(".")[0]
        cut = kept.get(parameter) if tensor.shape else None
        found[name] = [
            (None if part is None or cut is None else (cut.axis, part.start, part.stop), view.clone())
            for view, part in local_ranges(tensor, cut)
        ]
    return found


def run(config: TrainConfig, topology: tuple[int, int, int]) -> list[dict[str, Any]]:
    if topology[0] == 1:
        return [train_rank(0, 1, config)]
    return run_ranks(train_rank, topology[0], config=config)


def losses(config: TrainConfig) -> list[float]:
    lines = (Path(config.checkpoint.folder) / "metrics.jsonl").read_text().splitlines()
    return [record["loss_metrics/global_avg_loss"] for record in map(json.loads, lines) if "grad_norm" in record]


def assert_holds(ranks: list[dict[str, list[tuple[Any, torch.Tensor]]]], saved: dict[str, torch.Tensor]) -> None:
    """Every rank's parts are, bit for bit, those of the saved tensors."""
    for rank, tensors in enumerate(ranks):
        assert tensors.keys() == saved.keys()
        for name, parts in tensors.items():
            for part, view in parts:
                expected = saved[name] if part is None else saved[name].narrow(part[0], part[1], part[2] - part[1])
                assert_bitwise_equal(view, expected, f"{name} {part}, rank {rank}")


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint, _ = find(folder)
    assert checkpoint is not None
    shapes = {name: entry for name, entry in tensor_shapes(checkpoint).items() if not name.startswith("rng")}
    state = {name: torch.full(shape, torch.nan, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    load(checkpoint, state, together=False)
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resharding")
    write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def straight(folder: Path) -> list[float]:
    """The losses of one process that is never interrupted."""
    config = configured(folder, SP1, "straight", STEPS)
    run(config, SP1)
    return losses(config)


@pytest.mark.parametrize(
    "before, after, parallel",
    [
        (TP2_SP2, (SP1, DP2, DP3), {}),
        (SP1, (TP2,), {}),
        (TP2, (TP2_SP2,), {"data_parallel_backend": "ddp"}),
    ],
    ids=["tp2 x sp2", "sp1", "tp2, ddp"],
)
def test_goes_on_anywhere(
    before: Any, after: Any, parallel: Any, folder: Path, straight: list[float], tmp_path: Path
) -> None:
    config = replace(configured(folder, before, "", CUT, **parallel), checkpoint=tiny(tmp_path).checkpoint)
    ranks = run(config, before)
    saved = saved_tensors(tmp_path / "run")
    assert_holds([rank["after"] for rank in ranks], saved)
    for topology in after:
        goes_on = configured(folder, topology, "", STEPS)
        resumed = replace(config.checkpoint, folder=str(tmp_path / f"{topology}"), resume=config.checkpoint.folder)
        goes_on = replace(goes_on, checkpoint=resumed)
        assert_holds([rank["before"] for rank in run(goes_on, topology)], saved)
        torch.testing.assert_close(losses(config) + losses(goes_on), straight, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["fsdp", "ddp"])
def test_experts_go_on_anywhere(backend: str, folder: Path, tmp_path: Path) -> None:
    model = {"ffn": "moe", "moe": replace(ModelConfig().moe, num_experts=4, expert_hidden_size=8)}
    straight = configured(folder, SP1, str(tmp_path / "straight"), STEPS, model)
    run(straight, SP1)
    parallel = {"expert_parallel_size": 2, "data_parallel_backend": backend}
    cut = configured(folder, DP2, str(tmp_path / "cut"), CUT, model, **parallel)
    ranks = run(cut, DP2)
    saved = saved_tensors(tmp_path / "cut")
    assert_holds([rank["after"] for rank in ranks], saved)
    again = configured(folder, DP2, str(tmp_path / "cut"), CUT + 1, model, **parallel)
    assert_holds([rank["before"] for rank in run(again, DP2)], saved)
    alone = configured(folder, SP1, str(tmp_path / "cut"), STEPS, model)
    run(alone, SP1)
    torch.testing.assert_close(losses(alone), losses(straight), rtol=1e-5, atol=0)


def test_carried_states_are_refused(folder: Path) -> None:
    config = configured(folder, TP2, "carried", 1)
    with pytest.raises(UserError, match=r"data\.carry_state needs tensor_parallel_size 1, not 2"):
        replace(config, data=replace(config.data, carry_state=True)).resolve(2)


def test_experts_are_needed(folder: Path) -> None:
    config = configured(folder, DP2, "none", 1, expert_parallel_size=2)
    with pytest.raises(UserError, match=r"expert_parallel_size 2 needs experts, but model\.ffn is swiglu"):
        config.resolve(2)
