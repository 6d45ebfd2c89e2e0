"""`longhaul plan memory`: counts are the model's, and what is predicted of a process is what its tensors take."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longhaul.launcher.config import TrainConfig
from longhaul.launcher.plan.memory import PROCESS, predict, predict_each, total
from longhaul.launcher.plan.memory_cli import main
from longhaul.launcher.plan.memory_ranks import measure
from longhaul.models.config import ModelConfig
from longhaul.models.lm import LanguageModel
from longhaul.parallel.pipeline.order import BACKWARD, FORWARD, INPUT, WEIGHT, order
from longhaul.parallel.pipeline.stages import SCHEDULES
from longhaul.parallel.runtime import Runtime
from tests.harness import run_ranks
from tests.launcher.runs import tiny, write_corpus

MODEL = ModelConfig(hidden_size=32, num_heads=2, num_layers=4, pattern="LLLN", linear_mixer="linear_attention")
WITHIN = 0.15


def config(tokens: int = 2048, **train: object) -> TrainConfig:
    base = TrainConfig(model=MODEL)
    return replace(base, data=replace(base.data, seq_length=tokens), train=replace(base.train, **train))


def parts(run: TrainConfig, processes: int = 1) -> dict[str, float]:
    return {part.name: part.bytes for part in predict(run, processes)}


def test_what_is_counted_is_the_model_s() -> None:
    count = sum(parameter.numel() for parameter in LanguageModel(MODEL).parameters())
    one, two = parts(config()), parts(config(), 2)
    assert (one["parameters"], one["optimizer"]) == (4 * count, 8 * count)
    assert two["parameters"] == one["parameters"] / 2, "fsdp shards over data-parallel processes"


def test_activations_grow_with_tokens_and_shrink_with_what_is_not_kept() -> None:
    whole, longer = parts(config())["activations"], parts(config(4096))["activations"]
    assert 1.8 * whole < longer < 2.2 * whole
    assert parts(config(activation_checkpointing="full"))["activations"] < 0.3 * whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    write_corpus(folder / "corpus", 40)
    return folder


def held(rank: int, world_size: int, config: TrainConfig) -> dict[str, Any]:
    return measure(Runtime(rank, world_size, rank, device="cpu", timeout=60.0), config)


PIPELINE = {"pipeline_parallel_size": 2}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"parallel": {"tensor_parallel_size": 2}}),
    "sp2": (2, {"parallel": {"sequence_parallel_size": 2}}),
    "pp2": (2, {"parallel": PIPELINE}),
    "pp2, gpipe": (2, {"parallel": {**PIPELINE, "pipeline_schedule": "gpipe"}}),
    "pp2, interleaved": (2, {"parallel": {**PIPELINE, "pipeline_schedule": "interleaved_1f1b"}}),
    "pp2, zero bubble": (2, {"parallel": {**PIPELINE, "pipeline_schedule": "interleaved_zero_bubble"}}),
    "dp2 x ep2": (
        2,
        {"parallel": {"expert_parallel_size": 2}, "model": {"ffn": "moe", "moe": replace(ModelConfig().moe, num_experts=4)}},
    ),
    "streamed": (1, {"train": {"stream_tokens": 512}, "data": {"seq_length": 4096}}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_process_holds_what_was_predicted(name: str, folder: Path) -> None:
    processes, sections = RUNS[name]
    data, train, parallel = ({"seq_length": 1024}, {"global_batch_size": 4 if "pp" in name else None}, {})
    model = {"num_layers": 4, "pattern": "LLLN", "hidden_size": 32}
    given = {"data": data, "train": train, "parallel": parallel, "model": model}
    run = tiny(folder, **{section: {**values, **sections.get(section, {})} for section, values in given.items()})
    each = predict_each(run, processes)
    for rank, found in enumerate(run_ranks(held, processes, config=run)):
        predicted = total(part for part in each[found["place"]] if part.name != PROCESS)
        assert abs(predicted / found["peak"] - 1) < WITHIN, f"rank {rank} held {found['peak']} bytes, {predicted:.0f} predicted"


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model.hidden_size", "32", "--model.num_heads", "2", "--data.seq_length", "1024"]
    assert main([*arguments, "--json", str(tmp_path / "found.json")]) == 0
    assert "total" in capsys.readouterr().out
    assert (tmp_path / "found.json").exists()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_order_runs_every_micro_batch_through_every_stage_once(schedule: str) -> None:
    each, streams = 2 if SCHEDULES[schedule].several else 1, 6
    ran: dict[int, list[str]] = {}
    for rank in range(3):
        for action in order(schedule, 3, each, streams, rank):
            ran.setdefault(action.stage, []).append(action.kind)
    assert sorted(ran) == list(range(3 * each))
    for kinds in ran.values():
        assert kinds.count(FORWARD) == streams
        assert kinds.count(INPUT) == kinds.count(WEIGHT) == streams - kinds.count(BACKWARD)


def test_1f1b_keeps_as_many_streams_as_stages_follow() -> None:
    for rank in range(4):
        alive = most = 0
        for action in order("1f1b", 4, 1, 8, rank):
            alive += 1 if action.kind == FORWARD else -1
            most = max(most, alive)
        assert most == 4 - rank
