"""`longhaul plan memory`: counts are the model's, what is measured grows as it must, and what it does not know it refuses."""

from dataclasses import replace
from pathlib import Path

import pytest

from longhaul.launcher.config import TrainConfig
from longhaul.launcher.plan.memory import predict
from longhaul.launcher.plan.memory_cli import main
from longhaul.models.config import ModelConfig
from longhaul.models.errors import UserError
from longhaul.models.lm import LanguageModel

MODEL = ModelConfig(hidden_size=32, num_heads=2, num_layers=4, pattern="LLLN", linear_mixer="linear_attention")


def config(tokens: int = 2048, **train: object) -> TrainConfig:
    base = TrainConfig(model=MODEL)
    return replace(base, data=replace(base.data, seq_length=tokens), train=replace(base.train, **train))


def parts(run: TrainConfig, processes: int = 1) -> dict[str, float]:
    return {part.name: part.bytes for part in predict(run, processes)}


def test_what_is_counted_is_the_model_s() -> None:
    count = sum(parameter.numel() for parameter in LanguageModel(MODEL).parameters())
    one, two = parts(config()), parts(config(), 2)
    assert (one["parameters"], one["gradients"], one["optimizer"]) == (4 * count, 4 * count, 8 * count)
    assert two["parameters"] == one["parameters"] / 2, "fsdp shards over data-parallel processes"


def test_activations_grow_with_tokens_and_shrink_with_what_is_not_kept() -> None:
    whole, longer = parts(config())["activations"], parts(config(4096))["activations"]
    assert 1.8 * whole < longer < 2.2 * whole
    assert parts(config(activation_checkpointing="full"))["activations"] < 0.3 * whole
    assert parts(config(8192, stream_tokens=2048))["activations"] == pytest.approx(whole, rel=0.05)


def test_refusals_and_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = config()
    with pytest.raises(UserError, match="tensor_parallel_size 2"):
        predict(replace(run, parallel=replace(run.parallel, tensor_parallel_size=2)), 2)
    arguments = ["--model.hidden_size", "32", "--model.num_heads", "2", "--data.seq_length", "1024"]
    assert main([*arguments, "--json", str(tmp_path / "found.json")]) == 0
    assert "total" in capsys.readouterr().out
    assert (tmp_path / "found.json").exists()
