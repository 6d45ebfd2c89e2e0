"""A run that is cut and goes on equals one that was not: bit for bit on the same topology, closely on another."""

import errno
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longhaul.launcher.config import TrainConfig
from longhaul.launcher.data import Data, Stream
from longhaul.launcher.load import load_model
from longhaul.launcher.parsing import from_file
from longhaul.launcher.trainer import Trainer
from longhaul.models.errors import UserError
from longhaul.parallel import checkpoint as checkpoint_module
from longhaul.parallel.runtime import Runtime
from tests.harness import run_ranks
from tests.harness.numerics import assert_bitwise_equal, assert_trees_close

from .runs import tiny, train_rank, whole_parameters, write_corpus


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus")
    return tmp_path


def run(config: TrainConfig, world_size: int = 1, stop_at: int = 0) -> list[Any]:
    if world_size == 1:
        return [train_rank(0, 1, config, stop_at)]
    return run_ranks(train_rank, world_size, config=config, stop_at=stop_at)


def losses(config: TrainConfig) -> list[tuple[int, float, float]]:
    lines = (Path(config.checkpoint.folder) / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "grad_norm" in record]
    return [(record["step"], record["loss_metrics/global_avg_loss"], record["grad_norm"]) for record in records]


SAME = [
    (1, {"train": {"global_batch_size": 2}}),
    (1, {"data": {"carry_state": True}, "train": {"global_batch_size": 2}}),
    (2, {"parallel": {"sequence_parallel_size": 2}}),
    (2, {"parallel": {"sequence_parallel_size": 2}, "data": {"carry_state": True}}),
    (2, {"parallel": {"data_parallel_backend": "ddp"}}),
    (4, {"parallel": {"sequence_parallel_size": 2}, "checkpoint": {"background": False}}),
]


@pytest.mark.parametrize(("world_size", "sections"), SAME)
def test_bit_for_bit_on_the_same_topology(folder: Path, world_size: int, sections: Any) -> None:
    straight = tiny(folder, **sections)
    (outcome, expected), *_ = run(straight, world_size)
    assert (outcome.step, outcome.stop_signal) == (6, 0)
    sections = {**sections, "checkpoint": {**sections.get("checkpoint", {}), "folder": str(folder / "cut")}}
    cut = tiny(folder, **sections)
    (outcome, _), *_ = run(cut, world_size, stop_at=4)
    assert (outcome.step, outcome.stop_signal) == (4, 15)
    for outcome, actual in run(cut, world_size):
        assert outcome.step == 6
        for name, parameter in actual.items():
            assert_bitwise_equal(parameter, expected[name], name)
    assert losses(cut) == losses(straight)


@pytest.mark.parametrize("before", [1, 2])
def test_another_topology_goes_on_closely(folder: Path, before: int) -> None:
    def config(world_size: int, run_folder: str) -> TrainConfig:
        return tiny(
            folder,
            parallel={"sequence_parallel_size": world_size},
            train={"global_batch_size": 2},
            optimizer={"name": "sgd", "lr": 0.3},
            checkpoint={"folder": str(folder / run_folder)},
        )

    (_, expected), *_ = run(config(1, "straight"))
    run(config(before, "cut"), before, stop_at=4)
    after = 3 - before
    (_, actual), *_ = run(config(after, "cut"), after)
    assert_trees_close(actual, expected, "parameters")


def test_resume_names_a_checkpoint(folder: Path) -> None:
    first = tiny(folder, checkpoint={"keep": 0})
    (_, expected), *_ = run(first)
    branch = tiny(folder, checkpoint={"folder": str(folder / "branch"), "resume": str(folder / "run" / "step_3")})
    (outcome, actual), *_ = run(branch)
    assert outcome.step == 6
    for name, parameter in actual.items():
        assert_bitwise_equal(parameter, expected[name], name)
    with pytest.raises(UserError, match="already holds step_6 of its own"):
        run(branch)


def test_resume_never_wants_an_empty_folder(folder: Path) -> None:
    config = tiny(folder, checkpoint={"resume": "never"})
    run(config)
    with pytest.raises(UserError, match=r"already holds step_6 and checkpoint\.resume is never"):
        run(config)


def test_resume_from_nothing(folder: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        run(tiny(folder, checkpoint={"resume": str(folder / "nowhere")}))
    with pytest.raises(UserError, match="holds no checkpoint"):
        run(tiny(folder, checkpoint={"resume": str(folder / "corpus")}))


OTHERS = [
    ("model", {"num_heads": 4}, "another model: model.num_heads is 2 there and 4 here"),
    ("data", {"seq_length": 64}, "another data: data.paths"),
    ("data", {"seed": 9}, "another data"),
    ("optimizer", {"name": "sgd"}, "another optimizer: optimizer.name is adamw there and sgd here"),
]


@pytest.mark.parametrize(("section", "change", "message"), OTHERS)
def test_a_checkpoint_of_another_run_is_refused(folder: Path, section: str, change: Any, message: str) -> None:
    config = tiny(folder, train={"steps": 1})
    run(config)
    before = sorted((path, path.stat().st_mtime_ns) for path in (folder / "run").rglob("*"))
    with pytest.raises(UserError, match=message):
        run(tiny(folder, **{section: change}))
    assert sorted((path, path.stat().st_mtime_ns) for path in (folder / "run").rglob("*")) == before, "nothing is touched"


def test_a_truncated_checkpoint_is_passed_over(folder: Path) -> None:
    config = tiny(folder)
    (_, expected), *_ = run(config)
    tensors = next((folder / "run" / "step_6").glob("*.distcp"))
    tensors.write_bytes(tensors.read_bytes()[:-1])
    trainer = Trainer(config, Runtime(device="cpu"))
    assert trainer.step == 3
    assert "step_6 is not a complete checkpoint" in trainer.messages[0]
    trainer.run()
    for name, parameter in whole_parameters(trainer.model.model).items():
        assert_bitwise_equal(parameter, expected[name], name)


def test_a_finished_run_only_judges_again(folder: Path) -> None:
    config = tiny(folder)
    (first, _), *_ = run(config)
    (again, _), *_ = run(config)
    assert again == first
    assert first.held_out_loss is not None


class FullDisk(checkpoint_module.FileSystemWriter):
    def write_data(self, plan: Any, planner: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_in_between_does_not_end_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(folder, metrics={"display": "plain"})
    trainer = Trainer(config, Runtime(device="cpu"))
    monkeypatch.setattr(checkpoint_module, "FileSystemWriter", FullDisk)
    save = trainer.checkpoints.save

    def room_at_the_end(step: int, *arguments: Any) -> None:
        trainer.checkpoints.wait()
        if step == 6:
            monkeypatch.undo()
        save(step, *arguments)

    trainer.checkpoints.save = room_at_the_end  # type: ignore[method-assign]
    assert trainer.run().step == 6
    assert "step_3 could not be written (no space left on the disk)" in capsys.readouterr().out
    assert checkpoint_module.find(folder / "run")[0].step == 6  # type: ignore[union-attr]


def test_a_full_disk_at_the_end_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(tiny(folder, train={"steps": 2}), Runtime(device="cpu"))
    monkeypatch.setattr(checkpoint_module, "FileSystemWriter", FullDisk)
    with pytest.raises(UserError, match="step_2 could not be written"):
        trainer.run()


def test_too_small_a_disk_is_refused_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longhaul.launcher import start

    monkeypatch.setattr(start.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="has only 0 MiB free"):
        Trainer(tiny(folder), Runtime(device="cpu"))


def test_no_checkpoints_at_all(folder: Path) -> None:
    run(tiny(folder, checkpoint={"every": 0}))
    assert not list((folder / "run").glob("step_*"))
    assert (folder / "run" / "metrics.jsonl").exists()


def test_what_a_run_leaves(folder: Path) -> None:
    config = tiny(folder, train={"eval_every": 2})
    outcome, parameters = train_rank(0, 1, config, report=True)
    assert outcome.step == 6
    left = {path.name for path in (folder / "run").iterdir()}
    assert left >= {"LATEST", "step_3", "step_6", "metrics.jsonl", "report.html", "sample.txt", "resolved_config.yaml"}
    assert from_file(folder / "run" / "resolved_config.yaml") == config.resolve(1)
    model, loaded, _ = load_model(folder / "run")
    assert loaded == config.resolve(1)
    for name, parameter in model.named_parameters():
        assert_bitwise_equal(parameter.detach(), parameters[name], name)
    records = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    evaluated = [r["step"] for r in records if "validation_metrics/global_avg_loss" in r]
    assert evaluated == [2, 4, 6]


def test_evaluation_is_the_same_on_any_topology(folder: Path) -> None:
    sections: Any = {"train": {"steps": 1, "global_batch_size": 4}, "checkpoint": {"every": 0}}
    (alone, _), *_ = run(tiny(folder, **sections))
    for world_size, sequence in ((4, 1), (2, 2)):
        for outcome, _ in run(tiny(folder, **sections, parallel={"sequence_parallel_size": sequence}), world_size):
            assert outcome.held_out_loss == pytest.approx(alone.held_out_loss, rel=1e-5)


def test_a_signal_in_the_evaluation_is_heard(folder: Path) -> None:
    asked = []

    def signal() -> int:
        asked.append(trainer.step)
        return 10 if trainer.step == 2 and asked.count(2) > 0 else 0

    trainer: Any = None
    trainer = Trainer(tiny(folder, train={"eval_every": 2}), Runtime(device="cpu"), lambda: 0 if trainer is None else signal())
    outcome = trainer.run()
    assert (outcome.step, outcome.stop_signal) == (2, 10)
    assert checkpoint_module.find(folder / "run")[0].step == 2  # type: ignore[union-attr]


def test_a_diverged_run_stops_unsaved(folder: Path) -> None:
    with pytest.raises(UserError, match=r"stopped without saving it: lower optimizer\.lr"):
        run(tiny(folder, optimizer={"name": "sgd", "lr": 1e30, "clip": 0.0, "min_lr": 0.0, "warmup_steps": 0}))
    found, _ = checkpoint_module.find(folder / "run")
    assert found is None


def test_carried_states_change_what_a_cut_document_sees(folder: Path) -> None:
    (_, fresh), *_ = run(tiny(folder, train={"steps": 3}, checkpoint={"every": 0}))
    (_, carried), *_ = run(tiny(folder, train={"steps": 3}, checkpoint={"every": 0}, data={"carry_state": True}))
    assert any(not torch.equal(fresh[name], carried[name]) for name in fresh)


def test_one_rank_without_data_stops_all(folder: Path) -> None:
    results = run_ranks(without_data_on_one_rank, 2, config=tiny(folder, parallel={"sequence_parallel_size": 2}))
    assert results[0] == results[1]
    assert "data.paths" in results[0]


def without_data_on_one_rank(rank: int, world_size: int, config: TrainConfig) -> str:
    from longhaul.launcher import start

    def load(config: Any) -> Data:
        raise UserError("The file x of data.paths is missing.")

    original = start.load_data
    if rank == 1:
        start.load_data = load
    try:
        train_rank(rank, world_size, config)
    except UserError as error:
        return str(error)
    finally:
        start.load_data = original
    return "nothing failed"


def test_streams_are_read_in_order(folder: Path) -> None:
    trainer = Trainer(tiny(folder, train={"steps": 2, "global_batch_size": 3}, checkpoint={"every": 0}), Runtime(device="cpu"))
    read: list[Stream] = []
    original = trainer.stepper.train

    def spy(streams: Any, rate: float) -> Any:
        read.extend(streams)
        return original(streams, rate)

    trainer.stepper.train = spy  # type: ignore[method-assign]
    trainer.run()
    assert trainer.consumed == 6
    for index, stream in enumerate(read):
        assert torch.equal(stream.tokens, trainer.data.train.stream(index).tokens)
