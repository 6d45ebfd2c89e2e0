"""Constants of layers whose times are known: found again, written, read, and used."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from longhaul.launcher import cli
from longhaul.launcher.config import TrainConfig
from longhaul.launcher.plan import calibrate, calibrate_cli
from longhaul.launcher.plan.census import BACKWARD, facts_of
from longhaul.launcher.plan.costs import cost_model, published_constants
from longhaul.models.config import LINEAR_MIXERS, ModelConfig
from longhaul.models.errors import UserError
from longhaul.models.lm import LanguageModel
from longhaul.parallel.planner.cost import PUBLISHED
from tests.launcher_plan.files import cluster_file, lengths_file

MODEL = ModelConfig(pattern="LLN-", num_layers=4, hidden_size=32, num_heads=2, vocab_size=264)
TRUE = {  # seconds a token squared, a token, a call
    "mamba2": (0.0, 3e-6, 2e-4),
    "attention": (1e-9, 2e-6, 1e-4),
    "dense": (0.0, 1e-6, 3e-5),
    "head": (0.0, 4e-6, 1e-5),
}


def known(mixer: str, tokens: int, run: calibrate.Run) -> float:
    square, slope, call = TRUE[mixer]
    return square * tokens**2 + slope * tokens + call


def test_round_trip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "calibration.json"
    flags = ["--model.pattern", "LLN-", "--model.hidden_size", "32", "--model.num_heads", "2"]
    assert calibrate_cli.main(["--output", str(path), *flags], timer=known) == 0
    assert "within the 6%" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert set(written["error"]) == {*TRUE, "model"} and max(written["error"].values()) < 2e-3
    assert {each["tokens"] for each in written["samples"] if each["held_out"]} == set(calibrate.HELD_OUT)

    config = TrainConfig(model=MODEL)
    model = cost_model(facts_of(MODEL), config, calibrate.read_calibration(path), ranks=8)
    for tokens in (100, 1000, 50_000):
        found = sum(float(layer.compute(np.asarray([tokens]))[0]) for layer in model.layers)
        calls = 2 * TRUE["mamba2"][2] + TRUE["attention"][2] + TRUE["dense"][2] + TRUE["head"][2]
        counts = {"mamba2": 2, "attention": 1, "dense": 1, "head": 1}
        times = sum(count * known(name, tokens, lambda: None) for name, count in counts.items())
        assert found == pytest.approx(times - calls, rel=2e-3)
    assert model.bias == pytest.approx(calls, rel=5e-3)

    wider = ModelConfig(pattern="LLN-", num_layers=8, hidden_size=64, num_heads=2, vocab_size=264)
    other = cost_model(facts_of(wider), TrainConfig(model=wider), calibrate.read_calibration(path), ranks=8)
    assert 2 * model.layers[1].quadratic == pytest.approx(other.layers[1].quadratic)  # twice the width

    command = ["plan", *flags, "--config", str(tmp_path / "run.yaml"), "--calibration", str(path)]
    (tmp_path / "run.yaml").write_text("train: {steps: 1}\n")
    inputs = ["--cluster", cluster_file(tmp_path), "--lengths", lengths_file(tmp_path, [900, 40, 300]), "--json"]
    assert cli.main([*command, *inputs]) == 0
    capsys.readouterr()
    assert cli.main([*command, "--model.linear_mixer", "gla", *inputs]) == 2
    assert "has no times of gla layers" in capsys.readouterr().err


def test_the_budget_leaves_long_lengths_out() -> None:
    config = TrainConfig(model=MODEL)
    slow = calibrate.measure(config, lambda mixer, tokens, run: 1e-3 * tokens, torch.device("cpu"), 1, seconds=30.0)
    assert max(each.tokens for each in slow.samples) == 1024
    with pytest.raises(UserError, match="give --seconds more"):
        calibrate.measure(config, lambda mixer, tokens, run: 1.0, torch.device("cpu"), 1, seconds=30.0)


def test_real_layers_are_timed() -> None:
    counted: dict[str, int] = {}

    def timer(mixer: str, tokens: int, run: calibrate.Run) -> float:
        run()
        counted[mixer] = counted.get(mixer, 0) + 1
        return known(mixer, tokens, run)

    lengths = {"lengths": (8, 16, 24), "held_out": (12,)}
    calibrate.measure(TrainConfig(model=MODEL), timer, torch.device("cpu"), 1, **lengths)
    assert counted == dict.fromkeys(TRUE, 4)
    assert calibrate.Clock(torch.device("cpu"), 1)("", 1, lambda: None) >= 0.0


@pytest.mark.parametrize(("flags", "said"), [
    (["--lengths", "8", "16", "--held-out", "16"], "cannot judge the fit"),
    (["--lengths", "0"], "must be above 0"),
    (["--output", "no/such/folder.json"], "in a folder that exists"),
])  # fmt: skip
def test_bad_flags(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "calibrate", *flags]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("text", "said"), [("{", "not JSON"), ("[]", "schema 1"), ('{"schema": 1}', "holds no rates")])
def test_a_bad_calibration_file(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        calibrate.read_calibration(path)


@pytest.mark.parametrize("name", LINEAR_MIXERS)
def test_the_census_counts_what_the_model_counts(name: str) -> None:
    config = ModelConfig(linear_mixer=name, pattern="LN", num_layers=2, hidden_size=32, num_heads=2, num_kv_heads=1)
    facts = facts_of(config)
    recurrent, attention = facts.layers
    assert recurrent.mixer == name and recurrent.states > 0 == recurrent.quadratic
    assert (attention.key_value, attention.heads) == (2 * 16, 2 * 2 * 16 + 2 * 16)
    with torch.device("meta"):
        model = LanguageModel(config)
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())
    for tokens in (0, 1000):
        counted = facts.head + sum(layer.layers * (layer.linear + layer.quadratic * tokens) for layer in facts.layers)
        assert counted == model.flops_per_token(tokens)
    assert attention.quadratic == BACKWARD * 2 * 32  # a causal query of width 32 meets half the keys, twice


def test_states_of_mamba2() -> None:
    config = ModelConfig(pattern="M", num_layers=1, hidden_size=32)
    settings, facts = config.mamba2, facts_of(config).layers[0]
    inner = settings.expand * 32
    assert facts.states == inner * settings.state_size
    assert facts.halo == (settings.conv_width - 1) * (inner + 2 * settings.num_groups * settings.state_size)


def test_published_constants_give_the_published_model_back() -> None:
    """Llama's 7B with its FLOPs at the published speed costs about what was published (its parameters are counted here)."""
    config = ModelConfig(
        pattern="N", num_layers=32, hidden_size=4096, num_heads=32, ffn_hidden_size=11008, vocab_size=32000, tie_embeddings=False
    )
    run = TrainConfig(model=config)
    model = cost_model(facts_of(config), run, published_constants(), 64, softmax_engine="head_split")
    quadratic, linear, bias, _ = PUBLISHED["7B"]
    (layer,) = model.layers
    assert layer.layers * layer.quadratic == pytest.approx(quadratic, rel=1e-9)
    assert layer.layers * layer.linear == pytest.approx(linear, rel=0.05)
    assert model.bias == pytest.approx(bias, rel=0.05)


def test_engines_of_a_run_become_the_planner_s() -> None:
    def engines(**flags: str) -> list[tuple[str, bool, bool]]:
        model = cost_model(facts_of(MODEL), TrainConfig(model=MODEL), published_constants(), 8, **flags)
        return [(layer.engine, layer.token_bytes > 0, layer.state_bytes > 0) for layer in model.layers]

    assert engines() == [("all_gather", False, True), ("all_gather", True, False)]
    assert engines(linear_engine="scan", softmax_engine="ring") == [("scan", False, True), ("ring", True, False)]
    assert engines(linear_engine="head_split")[0] == ("head_split", True, False)
