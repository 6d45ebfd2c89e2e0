"""JRT by configuration: contexts said twice and the two-part loss, the same on any number of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from longhaul.launcher.config import TrainConfig
from longhaul.launcher.trainer import Trainer
from longhaul.models.errors import UserError
from longhaul.models.mixers.jrt import JRTConfig
from longhaul.parallel.runtime import Runtime
from tests.harness import run_ranks
from tests.harness.numerics import assert_close, assert_trees_close

from .runs import tiny, train_rank, whole_parameters, write_corpus

PREFIX = 10


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus")
    return tmp_path


def config(folder: Path, **sections: Any) -> TrainConfig:
    model = {"linear_mixer": "jrt", "pattern": "L", "jrt": JRTConfig(prefix_length=PREFIX, feature_dim=3, chunk=16)}
    data = {"prefix_length": PREFIX, "repeat_context": 5, **sections.pop("data", {})}
    optimizer = {"name": "sgd", "clip": 0.0, "lr": 0.1}
    train = {"steps": 3, "global_batch_size": 2}
    return tiny(folder, model=model, data=data, optimizer=optimizer, train=train, **sections)


def steps(rank: int, world_size: int, config: TrainConfig) -> tuple[list[tuple[float, float, float]], dict[str, torch.Tensor]]:
    """Loss, gradient norm and weight of three steps, and the parameters after them."""
    trainer = Trainer(config, Runtime(rank, world_size, rank, device="cpu", timeout=30.0))
    found, size = [], trainer.mesh.degrees.data
    for step in range(3):
        mine = range(2 * step + trainer.mesh.data_rank, 2 * step + 2, size)
        result = trainer.stepper.train([trainer.data.train.stream(index) for index in mine], 0.1)
        found.append((result.loss, result.gradient_norm, result.weight))
    return found, whole_parameters(trainer.model.model)


@pytest.mark.parametrize("sections", ({"sequence_parallel_size": 2}, {"data_parallel_size": 2}), ids=("sequence", "data"))
def test_two_ranks_equal_one(folder: Path, sections: Any) -> None:
    expected, parameters = steps(0, 1, config(folder))
    for found, theirs in run_ranks(steps, 2, config=config(folder, parallel=sections)):
        assert_close(torch.tensor(found), torch.tensor(expected), "loss, gradient norm and weight")
        assert_trees_close(theirs, parameters, "parameters")


def test_the_command_trains_and_judges_what_is_behind_prefixes(folder: Path) -> None:
    outcome, _ = train_rank(0, 1, config(folder))
    assert outcome.step == 3 and outcome.held_out_loss is not None
    assert 4 < outcome.held_out_loss < 7, "near the uniform model's, nothing that sees its targets"


def test_a_model_that_reads_a_prefix_may_not_be_asked_for_it(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.prefix_length is 4: set it to 10"):
        config(folder, data={"prefix_length": 4})


def test_a_mask_needs_an_id(folder: Path) -> None:
    tight = config(folder)
    tight = tiny(folder, model={"vocab_size": 257}, data={"prefix_length": tight.data.prefix_length})
    with pytest.raises(UserError, match="257 and one for the masks"):
        Trainer(tight, Runtime(0, 1, 0, device="cpu", timeout=30.0))
