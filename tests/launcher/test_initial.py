"""No process holds the whole model while it starts, and all get the values that one process would have."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longhaul.launcher.config import TrainConfig
from longhaul.launcher.optimizer import undecayed_names
from longhaul.launcher.plan.allocations import recorded
from longhaul.launcher.trainer import Trainer
from longhaul.models.config import ModelConfig
from longhaul.models.lm import LanguageModel
from longhaul.models.mixers.registry import MIXERS
from longhaul.parallel.initial import Initialiser
from longhaul.parallel.pieces import Pieces, as_pieces, local_part
from longhaul.parallel.runtime import Runtime
from tests.harness import run_ranks
from tests.harness.poison import poisoned

from .runs import tiny, write_corpus

SEED = 5
CPU = torch.device("cpu")
MODEL: dict[str, Any] = {
    "num_layers": 6,
    "hidden_size": 64,
    "pattern": "LNLLNL",
    "linear_mixer": "mamba2",
    "mamba2": replace(ModelConfig().mamba2, state_size=4, head_dim=8),
    "num_heads": 4,
}
MOE = {"ffn": "moe", "moe": replace(ModelConfig().moe, num_experts=4)}


def initial(model: ModelConfig) -> LanguageModel:
    """Of one process, whole."""
    torch.manual_seed(SEED)
    return LanguageModel(model)


def start(rank: int, world_size: int, config: TrainConfig) -> dict[str, Any]:
    """Make a trainer: the most bytes meanwhile, and pieces of all tensors held here, each where it begins."""
    runtime = Runtime(rank, world_size, rank, device="cpu", timeout=30.0)
    with recorded() as found:
        trainer = Trainer(config, runtime)
    pieces: dict[str, list[tuple[tuple[int, ...], torch.Tensor]]] = {}
    for name, tensor in trainer.model.model.state_dict().items():
        held = as_pieces(tensor, trainer.model.cuts(name))
        parts = held.held if isinstance(held, Pieces) else [(local_part(held)[1], local_part(held)[0])]
        pieces[name] = [(tuple(offsets), part.detach().clone()) for offsets, part in parts]
    return {"peak": found.peak, "pieces": pieces}


@pytest.mark.parametrize(
    ("ranks", "model", "parallel", "most"),
    [
        (2, {}, {"tensor_parallel_size": 2}, 0.8),
        (2, {"tie_embeddings": True}, {"pipeline_parallel_size": 2}, 0.8),
        (2, MOE, {"expert_parallel_size": 2}, 0.9),
        (2, {}, {"data_parallel_backend": "ddp"}, None),
        (4, MOE, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "pipeline_schedule": "interleaved_1f1b"}, 0.6),
    ],
    ids=["tp2", "pp2", "dp2 x ep2", "ddp", "pp2 x tp2"],
)
def test_each_process_makes_its_part_of_the_same_model(
    ranks: int, model: dict[str, Any], parallel: dict[str, Any], most: float | None, tmp_path: Path
) -> None:
    write_corpus(tmp_path / "corpus")
    train = {"global_batch_size": 2, "seed": SEED}
    config = tiny(tmp_path, model={**MODEL, **model}, parallel=parallel, train=train, checkpoint={"every": 0})
    whole = initial(config.model).state_dict()
    size = sum(tensor.nbytes for tensor in whole.values())
    seen = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    for found in run_ranks(start, ranks, config=config):
        for name, pieces in found["pieces"].items():
            for offsets, piece in pieces:
                place = tuple(slice(first, first + length) for first, length in zip(offsets, piece.shape))
                assert torch.equal(piece, whole[name][place]), f"{name} at {offsets}"
                seen[name][place] = 1
        if most is not None:
            assert found["peak"] < most * size, f"{found['peak']} bytes of a model of {size}"
    assert all(bool(tensor.all()) for tensor in seen.values()), "no process holds some numbers"


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_parts_made_one_by_one_are_those_of_a_whole_model(mixer: str, tied: bool) -> None:
    linear = {} if mixer == "attention" else {"linear_mixer": mixer}
    config = ModelConfig(vocab_size=40, hidden_size=32, num_layers=3, num_heads=2, pattern="LNM", tie_embeddings=tied, **linear)
    expected = initial(config)
    with torch.device("meta"):
        model = LanguageModel(config)
    undecayed, before = undecayed_names(model), torch.get_rng_state()
    with poisoned():  # what is not initialised is NaN
        Initialiser(model, lambda name: (), CPU, SEED)(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert undecayed == undecayed_names(model) == undecayed_names(expected)
    for kind in ("named_parameters", "named_buffers"):
        values, wanted = dict(getattr(model, kind)()), dict(getattr(expected, kind)())
        assert values.keys() == wanted.keys()
        for name, value in values.items():
            assert value.dtype == wanted[name].dtype and torch.equal(value, wanted[name]), name
    tensors = [value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    assert not any(tensor.is_meta for tensor in tensors)
