"""A run saved on one topology goes on on any other, with the same documents, as if nothing had happened.

Between backends: tests/parallel/test_deepspeed.py. Signals, schedules: tests/quickstart/test_pipeline.py.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

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


class Topology(NamedTuple):
    """What the other sizes leave over is data parallel."""

    processes: int
    tensor: int = 1
    sequence: int = 1
    pipeline: int = 1


ALONE, DP2, DP3, TP2, PP2 = Topology(1), Topology(2), Topology(3), Topology(2, tensor=2), Topology(2, pipeline=2)
TP2_SP2, TP2_PP2_SP2 = Topology(4, tensor=2, sequence=2), Topology(8, tensor=2, sequence=2, pipeline=2)


def configured(
    folder: Path, topology: Topology, run: str, steps: int, model: dict[str, Any] = MODEL, **parallel: Any
) -> TrainConfig:
    sizes = {f"{axis}_parallel_size": getattr(topology, axis) for axis in ("tensor", "sequence", "pipeline")}
    return tiny(
        folder,
        model=model,
        parallel={**sizes, **parallel},
        # The rate stays, whatever the number of steps; Adam divides by gradients' sizes, so the smallest are noise without eps.
        optimizer={"schedule": "constant", "warmup_steps": 0, "eps": 1e-4},
        train={"steps": steps, "global_batch_size": 6},
        checkpoint={"folder": str(folder / run)},
    )


def train_rank(rank: int, world_size: int, config: TrainConfig) -> dict[str, Any]:
    """Run a job; what this rank holds of every tensor, as (axis, start, stop) and values, when it begins and when it ends.

    `read`: of each step, the number of each stream read here, with its tokens and the bounds of its documents.
    """
    trainer = Trainer(config, Runtime(rank, world_size, rank, device="cpu", timeout=30.0))
    before, train, read = held(trainer), trainer.stepper.train, list[dict[int, Any]]()

    def noted(streams: Any, rate: float) -> Any:
        mesh = trainer.mesh
        read.append({mesh.data_rank + n * mesh.degrees.data: (each.tokens, each.bounds) for n, each in enumerate(streams)})
        return train(streams, rate)

    trainer.stepper.train = noted  # type: ignore[method-assign]
    with mock.patch("longhaul.launcher.trainer.write_results"):
        trainer.run()
    return {"before": before, "after": held(trainer), "read": read}


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


def run(config: TrainConfig, topology: Topology) -> list[dict[str, Any]]:
    if topology.processes == 1:
        return [train_rank(0, 1, config)]
    return run_ranks(train_rank, topology.processes, config=config)


def losses(config: TrainConfig) -> list[float]:
    lines = (Path(config.checkpoint.folder) / "metrics.jsonl").read_text().splitlines()
    return [record["loss_metrics/global_avg_loss"] for record in map(json.loads, lines) if "grad_norm" in record]


def assert_holds(ranks: list[dict[str, list[tuple[Any, torch.Tensor]]]], saved: dict[str, torch.Tensor]) -> None:
    """Every rank's parts are, bit for bit, those of the saved tensors; of a pipeline all ranks together have all names."""
    assert {name for tensors in ranks for name in tensors} == saved.keys()
    for rank, tensors in enumerate(ranks):
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


class Straight(NamedTuple):
    """One process that is never interrupted; it saves at CUT, too."""

    config: TrainConfig
    losses: list[float]
    read: list[dict[int, Any]]


@pytest.fixture(scope="module")
def straight(folder: Path) -> Straight:
    config = configured(folder, ALONE, "straight", STEPS)
    config = replace(config, checkpoint=replace(config.checkpoint, every=CUT, keep=0))
    (rank,) = run(config, ALONE)
    return Straight(config, losses(config), rank["read"])


def assert_read(ranks: list[dict[str, Any]], expected: list[dict[int, Any]]) -> None:
    """All ranks of a step read its streams, by number, and nothing else."""
    for step, streams in enumerate(expected):
        assert {number for rank in ranks for number in rank["read"][step]} == streams.keys()
        for rank in ranks:
            assert len(rank["read"]) == len(expected)
            for number, (tokens, bounds) in rank["read"][step].items():
                assert torch.equal(tokens, streams[number][0]) and bounds == streams[number][1]


def assert_goes_on(
    checkpoint: Path, earlier: list[float], after: Topology, straight: Straight, folder: Path, where: Path
) -> None:
    """A run from a checkpoint of step CUT holds what was saved, reads on, and has the losses of the run in one piece."""
    saved = saved_tensors(checkpoint)
    config = configured(folder, after, "", STEPS)
    config = replace(config, checkpoint=replace(config.checkpoint, folder=str(where), resume=str(checkpoint)))
    ranks = run(config, after)
    assert_holds([rank["before"] for rank in ranks], saved)
    assert_read(ranks, straight.read[CUT:])
    torch.testing.assert_close(earlier + losses(config), straight.losses, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "before, after, parallel",
    [
        (TP2_PP2_SP2, (DP3, ALONE), {}),
        (TP2, (PP2,), {"data_parallel_backend": "ddp"}),
    ],
    ids=["tp2 x pp2 x sp2 to dp3", "tp2, ddp to pp2"],
)
def test_goes_on_anywhere(
    before: Topology, after: tuple[Topology, ...], parallel: Any, folder: Path, straight: Straight, tmp_path: Path
) -> None:
    config = replace(configured(folder, before, "", CUT, **parallel), checkpoint=tiny(tmp_path).checkpoint)
    ranks = run(config, before)
    assert_holds([rank["after"] for rank in ranks], saved_tensors(tmp_path / "run"))
    assert_read(ranks, straight.read[:CUT])
    for number, topology in enumerate(after):
        assert_goes_on(tmp_path / "run", losses(config), topology, straight, folder, tmp_path / str(number))


def test_one_process_goes_on_as_tp2_x_sp2(folder: Path, straight: Straight, tmp_path: Path) -> None:
    checkpoint = Path(straight.config.checkpoint.folder) / f"step_{CUT}"
    assert_goes_on(checkpoint, straight.losses[:CUT], TP2_SP2, straight, folder, tmp_path / "on")


@pytest.mark.parametrize("backend", ["fsdp", "ddp"])
def test_experts_go_on_anywhere(backend: str, folder: Path, tmp_path: Path) -> None:
    model = {"ffn": "moe", "moe": replace(ModelConfig().moe, num_experts=4, expert_hidden_size=8)}
    straight = configured(folder, ALONE, str(tmp_path / "straight"), STEPS, model)
    run(straight, ALONE)
    parallel = {"expert_parallel_size": 2, "data_parallel_backend": backend}
    cut = configured(folder, DP2, str(tmp_path / "cut"), CUT, model, **parallel)
    ranks = run(cut, DP2)
    saved = saved_tensors(tmp_path / "cut")
    assert_holds([rank["after"] for rank in ranks], saved)
    again = configured(folder, DP2, str(tmp_path / "cut"), CUT + 1, model, **parallel)
    assert_holds([rank["before"] for rank in run(again, DP2)], saved)
    alone = configured(folder, ALONE, str(tmp_path / "cut"), STEPS, model)
    run(alone, ALONE)
    torch.testing.assert_close(losses(alone), losses(straight), rtol=1e-5, atol=0)


def test_carried_states_are_refused(folder: Path) -> None:
    config = configured(folder, TP2, "carried", 1)
    with pytest.raises(UserError, match=r"data\.carry_state needs tensor_parallel_size 1, not 2"):
        replace(config, data=replace(config.data, carry_state=True)).resolve(2)


def test_experts_are_needed(folder: Path) -> None:
    config = configured(folder, DP2, "none", 1, expert_parallel_size=2)
    with pytest.raises(UserError, match=r"expert_parallel_size 2 needs experts, but model\.ffn is swiglu"):
        config.resolve(2)
