"""Every mistake in a configuration is one sentence that names the key; every good one comes back as it was."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from longhaul.launcher.config import TrainConfig
from longhaul.launcher.parsing import from_file, parse, to_yaml
from longhaul.models.errors import UserError

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  steps: 7\n  seed: 3\noptimizer:\n  lr: 3e-4\ndata:\n  paths: [a, b]\n")
    return path


def test_defaults() -> None:
    assert parse([]) == TrainConfig()


def test_a_file_and_flags_that_win(file: Path) -> None:
    config = parse(["--config", str(file), "--train.steps", "9", "--optimizer.betas", "[0.8,0.9]", "--model.mamba2.chunk=32"])
    assert (config.train.steps, config.train.seed, config.optimizer.lr) == (9, 3, 3e-4)
    assert (config.optimizer.betas, config.data.paths, config.model.mamba2.chunk) == ((0.8, 0.9), ("a", "b"), 32)


def test_two_files_the_later_wins(file: Path, tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("train: {seed: 5}\n")
    config = parse(["--config", str(file), f"--config={tmp_path / 'more.yaml'}"])
    assert (config.train.steps, config.train.seed) == (7, 5)


def test_round_trip(tmp_path: Path) -> None:
    config = parse(["--optimizer.betas", "[0.7,0.8]", "--data.paths", "[x]", "--model.num_kv_heads", "2"]).resolve(4)
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert from_file(tmp_path / "resolved.yaml") == config
    assert config.parallel.data_parallel_size == 4
    assert config.train.global_batch_size == 4


def test_quickstart_is_for_two_processes() -> None:
    config = from_file(QUICKSTART).resolve(2)
    assert config.parallel.sequence_parallel_size == 2
    assert config.data.seq_length >= 8192
    with pytest.raises(UserError, match="world size 1"):
        from_file(QUICKSTART).resolve(1)


FLAGS = [
    (["--train.stesp", "3"], r"^--train\.stesp is unknown: did you mean --train\.steps\?$"),
    (["--lr=3"], r"--lr is unknown: did you mean --optimizer\.lr\?"),
    (["--model.mamba2.sate_size", "3"], r"did you mean --model\.mamba2\.state_size\?"),
    (["--confg", "x"], r"did you mean --config\?"),
    (["--qqqqqqq"], r"longhaul train --help lists all"),
    (["--train", "x"], r"--train is unknown"),
    (["--train.steps", "many"], r"^train\.steps is 'many': give a whole number\.$"),
    (["--train.steps", "1.5"], r"train\.steps is '1\.5': give a whole number"),
    (["--optimizer.lr", "fast"], r"optimizer\.lr is 'fast': give a number"),
    (["--data.carry_state", "maybe"], r"give true or false"),
    (["--model.num_kv_heads", "x"], r"model\.num_kv_heads is 'x': give a whole number or null"),
    (["--data.paths", "folder"], r"data\.paths is 'folder': give a list of texts, as \[a,b\]"),
    (["--optimizer.betas", "0.3"], r"give a list of 2 numbers, as \[a,b\]"),
    (["--train.steps"], r"--train\.steps has no value"),
    (["folder"], r"folder is not understood"),
    (["--train.steps", "0"], r"train\.steps is 0: give 1 or more"),
    (["--train.seed", "-1"], r"train\.seed is -1"),
    (["--train.eval_every", "-1"], r"train\.eval_every is -1"),
    (["--train.timeout", "0"], r"train\.timeout is 0"),
    (["--train.micro_batch_size", "2"], r"train\.micro_batch_size is 2: only 1 is possible"),
    (["--train.global_batch_size", "0"], r"train\.global_batch_size is 0"),
    (["--train.precision", "fp4"], r"train\.precision is 'fp4': give fp32, bf16 or fp8"),
    (["--train.activation_checkpointing", "half"], r"give none, selective or full"),
    (["--train.device", "tpu"], r"give auto, cpu or cuda"),
    (["--optimizer.name", "adam"], r"optimizer\.name is 'adam': give adamw or sgd"),
    (["--optimizer.schedule", "step"], r"give cosine, wsd or constant"),
    (["--optimizer.lr", "-1"], r"optimizer\.lr is -1"),
    (["--optimizer.lr", ".nan"], r"optimizer\.lr is nan"),
    (["--optimizer.min_lr", "0.5"], r"min_lr 0\.5 is above optimizer\.lr"),
    (["--optimizer.betas", "[0.9,1.0]"], r"optimizer\.betas holds 1\.0"),
    (["--optimizer.decay_steps", "0"], r"optimizer\.decay_steps is 0"),
    (["--optimizer.warmup_steps", "-2"], r"optimizer\.warmup_steps is -2"),
    (["--checkpoint.every", "-1"], r"checkpoint\.every is -1"),
    (["--checkpoint.keep", "-1"], r"checkpoint\.keep is -1"),
    (["--checkpoint.folder", ""], r"checkpoint\.folder is empty"),
    (["--parallel.pipeline_schedule", "2f2b"], r"pipeline_schedule is '2f2b': give gpipe, 1f1b"),
    (["--parallel.expert_parallel_size", "2", "--parallel.pipeline_parallel_size", "2"], r"expert_parallel_size 2 does not work"),
    (["--parallel.data_parallel_backend", "zero"], r"give fsdp, ddp or deepspeed"),
    (["--parallel.parameter_dtype", "fp8"], r"parallel\.parameter_dtype is 'fp8'"),
    (["--parallel.parameter_dtype", "bf16", "--parallel.data_parallel_backend", "ddp"], r"needs .*fsdp, not ddp"),
    (["--schema_version", "7"], r"schema_version is 7, but this version of Longhaul reads 1"),
]


@pytest.mark.parametrize(("flags", "message"), FLAGS)
def test_bad_flags(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse(flags)
    assert "\n" not in str(caught.value)


FILES = [
    ("train: {stepz: 3}", r"The key train\.stepz in .*run\.yaml is unknown: did you mean train\.steps\?"),
    ("optimiser: {lr: 3}", r"The key optimiser in .* did you mean optimizer\?"),
    ("lr: 3", r"did you mean optimizer\.lr\?"),
    ("model: {mamba2: {chunks: 3}}", r"did you mean model\.mamba2\.chunk\?"),
    ("train:", r"train in .* holds None: put keys below it"),
    ("train: [1]", r"train in .* holds \[1\]"),
    ("train: {steps: many}", r"train\.steps is 'many': give a whole number"),
    ("hello", r"holds no keys"),
    ("", r"holds no keys"),
    ("train: [1, 2", r"is not YAML at line 1"),
    ("train:\n  steps: 3\n\tseed: 4", r"is not YAML at line 3"),
    ("schema_version: 0", r"schema_version is 0"),
]


@pytest.mark.parametrize(("text", "message"), FILES)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        parse(["--config", str(path)])
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "no.yaml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=message):
            parse(["--config", str(path)])
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not text"):
        parse(["--config", str(tmp_path / "binary.yaml")])
    with pytest.raises(UserError, match="--config has no value"):
        parse(["--config"])


RESOLVE: list[tuple[dict[str, dict[str, Any]], int, str]] = [
    ({"parallel": {"sequence_parallel_size": 4}}, 6, r"sequence 4 x tensor 1 = 4 do not divide the world size 6"),
    ({"parallel": {"data_parallel_size": 3}}, 2, r"data 3 .* = 3 are not the world size 2"),
    ({"train": {"global_batch_size": 3}}, 2, r"train\.global_batch_size 3 is not a multiple of the 2 data-parallel"),
    ({"data": {"carry_state": True}}, 2, r"data\.carry_state needs data_parallel_size 1, not 2"),
]


@pytest.mark.parametrize(("sections", "world_size", "message"), RESOLVE)
def test_what_does_not_fit_together(sections: dict[str, dict[str, Any]], world_size: int, message: str) -> None:
    base = TrainConfig()
    changed = replace(base, **{name: replace(getattr(base, name), **values) for name, values in sections.items()})
    with pytest.raises(UserError, match=message):
        changed.resolve(world_size)


def test_print_config_shows_the_outcome(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--config", str(file), "--train.steps", "11", "--print_config"])
    assert caught.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["train"]["steps"], shown["train"]["seed"], shown["schema_version"]) == (11, 3, 1)


def test_help_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("--optimizer.warmup_steps", "Steps in which the learning rate rises linearly", "--model.mamba2.state_size"):
        assert text in shown
