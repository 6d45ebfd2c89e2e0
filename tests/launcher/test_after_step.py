"""What a layer learns from what a step showed it, and not by gradients: a codebook that is a moving average of keys."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longhaul.launcher.config import TrainConfig
from longhaul.launcher.trainer import Trainer
from longhaul.models.mixers.longvq import LongVQConfig
from longhaul.parallel.runtime import Runtime
from tests.harness import run_ranks
from tests.harness.numerics import assert_bitwise_equal, assert_close

from .runs import tiny, write_corpus

LONGVQ = LongVQConfig(num_codes=5, ema_rate=0.3, chunk=16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus")
    return tmp_path


def config(folder: Path, name: str, steps: int = 3, **sections: Any) -> TrainConfig:
    model = {"linear_mixer": "longvq", "longvq": LONGVQ}
    train = {"steps": steps, "global_batch_size": 2, **sections.pop("train", {})}
    sections["optimizer"] = {"schedule": "constant"}  # a run cut short has the same rates
    return tiny(folder, model=model, train=train, checkpoint={"folder": str(folder / name)}, **sections)


def codebooks(rank: int, world_size: int, config: TrainConfig, steps: int) -> list[torch.Tensor]:
    """The codebook at the start, and after each of some steps."""
    trainer = Trainer(config, Runtime(rank, world_size, rank, device="cpu", timeout=30.0))
    layer = trainer.model.model.layers[0].mixer
    assert "layers.0.mixer.codebook" not in dict(trainer.model.model.named_parameters())
    found = [layer.codebook.clone()]
    for step in range(trainer.step, steps):
        trainer.stepper.train([trainer.data.train.stream(index) for index in indices(trainer, step)], 1e-2)
        found.append(layer.codebook.clone())
        assert layer.chosen is None, "counts are of one step"
    return found


def indices(trainer: Trainer, step: int) -> range:
    size = trainer.mesh.degrees.data
    return range(2 * step + trainer.mesh.data_rank, 2 * step + 2, size)


TOPOLOGIES = (
    {"parallel": {"sequence_parallel_size": 2}},
    {"parallel": {"data_parallel_size": 2}},
    {"parallel": {"sequence_parallel_size": 2, "data_parallel_backend": "ddp"}},
    {"parallel": {"sequence_parallel_size": 2}, "train": {"activation_checkpointing": "full"}},
)


@pytest.mark.parametrize("sections", TOPOLOGIES, ids=("sequence", "data", "ddp", "recomputed"))
def test_ranks_keep_one_codebook(folder: Path, sections: Any) -> None:
    alone = codebooks(0, 1, config(folder, "one"), 3)
    for before, after in zip(alone, alone[1:]):
        assert (before - after).abs().max() > 1e-2
    ranks = run_ranks(codebooks, 2, config=config(folder, "two", **sections), steps=3)
    for step, expected in enumerate(alone):
        for rank in ranks:
            assert_close(rank[step], expected, f"codebook after {step} steps")
            assert_bitwise_equal(rank[step], ranks[0][step], f"codebook after {step} steps")


def trained(rank: int, world_size: int, config: TrainConfig) -> torch.Tensor:
    trainer = Trainer(config, Runtime(rank, world_size, rank, device="cpu", timeout=30.0))
    trainer.run()
    return trainer.model.model.layers[0].mixer.codebook.clone()


def test_a_run_that_goes_on_keeps_its_codebook(folder: Path) -> None:
    expected = trained(0, 1, config(folder, "straight", steps=4))
    halfway = trained(0, 1, config(folder, "cut", steps=2))
    assert (halfway - expected).abs().max() > 1e-2
    assert_bitwise_equal(trained(0, 1, config(folder, "cut", steps=4)), expected, "codebook")
    on_two = config(folder, "cut", steps=6, parallel={"sequence_parallel_size": 2})
    expected = trained(0, 1, config(folder, "longer", steps=6))
    for found in run_ranks(trained, 2, config=on_two):
        assert_close(found, expected, "codebook on another topology")


def test_a_codebook_that_learns_by_gradients_is_left_alone(folder: Path) -> None:
    model = {"linear_mixer": "longvq", "longvq": replace(LONGVQ, ema_rate=0.0)}
    trainer = Trainer(tiny(folder, model=model), Runtime(0, 1, 0, device="cpu", timeout=30.0))
    layer: Any = trainer.model.model.layers[0].mixer
    assert isinstance(layer.codebook, torch.nn.Parameter)
    before = layer.codebook.detach().clone()
    assert layer.observed() is None, "nothing to be sent"
    trainer.model.after_step()
    assert_bitwise_equal(layer.codebook.detach(), before, "codebook")
