"""The effective horizon of a run: that of its gates, the same on any number of ranks, and nothing of the steps changes."""

import math
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from longhaul.launcher.config import TrainConfig
from longhaul.launcher.data import Stream
from longhaul.launcher.horizon import Look, look_at_states
from longhaul.launcher.metrics.files import read_records
from longhaul.launcher.metrics.metrics import MIDDLE, SHORTEST, STATE_NORM
from longhaul.launcher.trainer import Trainer
from longhaul.models.mixers.mamba2 import Mamba2Config
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import WholeSequence
from longhaul.parallel.runtime import Runtime
from tests.harness import run_ranks
from tests.harness.numerics import assert_trees_close

from .runs import tiny, train_rank, write_corpus

TOKENS = 90  # of the stream: no whole documents, nothing divides


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus")
    return tmp_path


def three_layers(folder: Path, mixer: str, name: str, ranks: int = 1, every: int = 2) -> TrainConfig:
    return tiny(
        folder,
        model={"linear_mixer": mixer, "pattern": "L", "num_layers": 3, "mamba2": Mamba2Config(state_size=6, head_dim=8)},
        parallel={"sequence_parallel_size": ranks, "layout": "zigzag" if ranks > 1 else "contiguous"},
        metrics={"horizon_every": every},
        train={"steps": 4},
        checkpoint={"every": 0, "folder": str(folder / name)},
    )


def packed(trainer: Trainer) -> Stream:
    """A stream of several documents."""
    streams = (trainer.data.train.stream(index) for index in range(20))
    return next(stream for stream in streams if len(stream.bounds) > 2 and stream.bounds[1] < TOKENS)


def measured(rank: int, world_size: int, config: TrainConfig) -> Look:
    trainer = Trainer(config, Runtime(rank, world_size, device="cpu"))
    return look_at_states(trainer.model, trainer.engine, packed(trainer), trainer.runtime.device, most=TOKENS)


class GatesOf(WholeSequence):
    """Keeps the log decays [T, H] that Mamba-2 gives to its scans."""

    def scan(self, op: Any, x: Any, state: Any = None) -> Any:
        out, after = super().scan(op, x, state)
        self.gates, self.after = [*getattr(self, "gates", []), x[3]], [*getattr(self, "after", []), after]
        return out, after


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_it_is_that_of_the_gates_on_any_number_of_ranks(ranks: int, folder: Path) -> None:
    trainer = Trainer(three_layers(folder, "mamba2", "oracle"), Runtime(device="cpu"))
    stream = packed(trainer)
    bounds = (*(bound for bound in stream.bounds if bound < TOKENS), TOKENS)
    shard = GatesOf(Documents(bounds, stream.first_position), keep_state=True)
    with torch.no_grad():
        trainer.model.model(stream.tokens[:TOKENS], shard)
    layers = [max((20 / -gates.double().mean(0)).tolist()) for gates in shard.gates]
    assert len(layers) == 3
    config = three_layers(folder, "mamba2", f"measured{ranks}", ranks)
    for found in run_ranks(measured, ranks, config=config) if ranks > 1 else [measured(0, 1, config)]:
        assert found.horizons == pytest.approx((min(layers), median(layers)), rel=1e-4)
        assert found.norm == pytest.approx(max(S.flatten(1).norm(dim=1).max().item() for S in shard.after), rel=1e-4)


SLOWEST = 1 - 1 / 64  # decay of the second of two heads of retention


@pytest.mark.parametrize(("mixer", "tokens"), [("retention", 20 / -math.log(SLOWEST)), ("deltanet", None)])
def test_constant_decays_and_none(mixer: str, tokens: float | None, folder: Path) -> None:
    found = measured(0, 1, three_layers(folder, mixer, mixer))
    assert found.norm is not None
    assert found.norm > 0
    assert found.horizons == (None if tokens is None else pytest.approx((tokens, tokens), rel=1e-5))


def test_a_run_records_it_and_is_the_same_run(folder: Path) -> None:
    outcomes = [train_rank(0, 1, three_layers(folder, "mamba2", f"every{every}", every=every)) for every in (0, 2)]
    assert_trees_close(outcomes[1][1], outcomes[0][1], "parameters", tolerance=0.0)
    assert not any(SHORTEST in record for record in read_records(folder / "every0"))
    found = [record for record in read_records(folder / "every2") if SHORTEST in record]
    assert [record["step"] for record in found] == [2, 4]
    assert all(0 < record[SHORTEST] <= record[MIDDLE] for record in found)
    assert [record["step"] for record in read_records(folder / "every2") if record.get(STATE_NORM, 0) > 0] == [2, 4]
