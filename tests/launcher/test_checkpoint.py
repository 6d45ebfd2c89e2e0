"""A checkpoint is complete or not there: atomic, kept, refused when damaged, and a full disk loses nothing."""

import errno
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from longhaul.models.errors import UserError
from longhaul.parallel import checkpoint as module
from longhaul.parallel.checkpoint import FACTS, LATEST, Checkpoints, SaveError, find, inspect, load, remove_leftovers, steps_in
from longhaul.parallel.mesh import Degrees, ParallelMesh
from longhaul.parallel.runtime import Runtime
from tests.harness import run_ranks


def state(value: float) -> dict[str, torch.Tensor]:
    return {"model.weight": torch.full((3, 4), value), "rng.0": torch.arange(7, dtype=torch.uint8)}


def saved(folder: Path, *steps: int, keep: int = 0) -> Checkpoints:
    checkpoints = Checkpoints(folder, Runtime(device="cpu"), keep=keep)
    for step in steps:
        checkpoints.save(step, state(step), {"samples": 10 * step}, {"note.txt": "hello"})
    checkpoints.wait()
    return checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_saves_facts_texts_and_tensors(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 5)
    assert checkpoints.last_good == tmp_path / "step_5"
    found, bad = find(tmp_path)
    assert found is not None
    assert not bad
    assert (found.step, found.facts["samples"]) == (5, 50)
    assert (found.path / "note.txt").read_text() == "hello"
    filled = state(0.0)
    load(found, filled)
    assert torch.equal(filled["model.weight"], torch.full((3, 4), 5.0))
    assert names(tmp_path) == [LATEST, "step_5"]


def test_state_is_copied_before_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, write = threading.Event(), module.write_tensors

    def late(*args: Any, **kwargs: Any) -> None:
        assert gate.wait(20)
        write(*args, **kwargs)

    monkeypatch.setattr(module, "write_tensors", late)
    checkpoints = Checkpoints(tmp_path, Runtime(device="cpu"))
    live = state(1.0)
    checkpoints.save(1, live, {})  # returns although nothing is written yet
    live["model.weight"].fill_(9.0)
    assert find(tmp_path)[0] is None
    gate.set()
    checkpoints.wait()
    filled = state(0.0)
    load(inspect(tmp_path / "step_1"), filled)
    assert torch.equal(filled["model.weight"], torch.ones(3, 4))


def test_keeps_the_newest(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 10, keep=2)
    assert names(tmp_path) == [LATEST, "step_10", "step_2"]
    assert (tmp_path / LATEST).read_text() == "step_10\n"
    saved(tmp_path, 11, keep=0)
    assert [step for step, _ in steps_in(tmp_path)] == [11, 10, 2]


def test_a_step_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    saved(tmp_path, 4)
    checkpoints = Checkpoints(tmp_path, Runtime(device="cpu"), background=False)
    checkpoints.save(4, state(8.0), {"samples": 1})
    filled = state(0.0)
    load(inspect(tmp_path / "step_4"), filled)
    assert filled["model.weight"][0, 0] == 8
    assert names(tmp_path) == [LATEST, "step_4"]


def test_latest_decides_and_may_be_lost(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / LATEST).write_text("step_1\n")
    assert find(tmp_path)[0].path == tmp_path / "step_1"  # type: ignore[union-attr]
    (tmp_path / LATEST).unlink()
    assert find(tmp_path)[0].path == tmp_path / "step_2"  # type: ignore[union-attr]
    assert find(tmp_path / "step_1")[0].step == 1  # type: ignore[union-attr]


def truncate(path: Path) -> None:
    tensors = next(path.glob("*.distcp"))
    tensors.write_bytes(tensors.read_bytes()[:-5])


@pytest.mark.parametrize("damage", ["truncated", "without facts", "broken facts", "without metadata"])
def test_a_damaged_one_is_passed_over(tmp_path: Path, damage: str) -> None:
    saved(tmp_path, 1, 2)
    path = tmp_path / "step_2"
    if damage == "truncated":
        truncate(path)
    elif damage == "without facts":
        (path / FACTS).unlink()
    elif damage == "broken facts":
        (path / FACTS).write_text('{"facts": {"st')
    else:
        (path / ".metadata").unlink()
    found, bad = find(tmp_path)
    assert found is not None
    assert found.step == 1
    assert len(bad) == 1
    assert str(path) in bad[0]
    with pytest.raises(UserError, match="not a complete checkpoint"):
        find(path)
    truncate(tmp_path / "step_1")
    with pytest.raises(UserError, match="No good checkpoint is left"):
        find(tmp_path)


def test_an_interrupted_save_is_not_a_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    half = tmp_path / "step_2.tmp"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half")
    found, bad = find(tmp_path)
    assert found is not None
    assert (found.step, bad) == (1, [])
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [LATEST, "step_1"]


class FullDisk(module.FileSystemWriter):
    """Fails as a full disk does, after some of the bytes."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        (Path(self.path) / "__0_0.distcp").write_bytes(b"some")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = saved(tmp_path, 1)
    monkeypatch.setattr(module, "FileSystemWriter", FullDisk)
    checkpoints.save(2, state(2.0), {})
    with pytest.raises(SaveError, match=r"step_2 could not be written \(no space left on the disk\).*step_1"):
        checkpoints.wait()
    assert names(tmp_path) == [LATEST, "step_1"]
    assert find(tmp_path)[0].step == 1  # type: ignore[union-attr]
    monkeypatch.undo()
    checkpoints.save(3, state(3.0), {})  # there is room again
    checkpoints.wait()
    assert find(tmp_path)[0].step == 3  # type: ignore[union-attr]


def test_facts_that_do_not_fit_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = saved(tmp_path, 1)

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_atomically", full)
    checkpoints.save(2, state(2.0), {})
    with pytest.raises(SaveError, match="no space left"):
        checkpoints.wait()
    assert names(tmp_path) == [LATEST, "step_1"]


def fail_on_one_rank(rank: int, world_size: int, folder: Path) -> str:
    runtime = Runtime(rank, world_size, device="cpu")
    mesh = ParallelMesh(Degrees(data=world_size), rank).gradient_mesh
    checkpoints = Checkpoints(folder, runtime)
    shared = {"x": distribute_tensor(torch.arange(10.0), mesh, [Shard(0)]), f"rng.{rank}": torch.tensor([rank])}
    checkpoints.save(1, shared, {"samples": 1})
    checkpoints.wait()
    if rank == 1:
        module.FileSystemWriter = FullDisk  # type: ignore[misc]
    try:
        checkpoints.save(2, shared, {"samples": 2})
        checkpoints.wait()
    except SaveError as error:
        return str(error)
    finally:
        module.FileSystemWriter = FullDisk.__base__  # type: ignore[misc,assignment]
    return "nothing failed"


def test_one_rank_with_a_full_disk_stops_the_save_of_all(tmp_path: Path) -> None:
    first, second = run_ranks(fail_on_one_rank, 2, folder=tmp_path)
    assert first == second
    assert "no space left on the disk" in first
    assert names(tmp_path) == [LATEST, "step_1"]
    found = inspect(tmp_path / "step_1")  # and what two ranks wrote, one reads
    whole = {"x": torch.zeros(10), "rng.1": torch.zeros(1, dtype=torch.int64)}
    load(found, whole)
    assert torch.equal(whole["x"], torch.arange(10.0))
    assert whole["rng.1"] == 1


def reshard(rank: int, world_size: int, folder: Path) -> torch.Tensor:
    mesh = ParallelMesh(Degrees(sequence=world_size), rank).gradient_mesh
    x: Any = distribute_tensor(torch.zeros(10), mesh, [Shard(0)])
    load(inspect(folder / "step_1"), {"x": x})
    assert isinstance(x, DTensor)
    return x.full_tensor()


def test_any_topology_reads(tmp_path: Path) -> None:
    Checkpoints(tmp_path, Runtime(device="cpu"), background=False).save(1, {"x": torch.arange(10.0)}, {})
    for x in run_ranks(reshard, 3, folder=tmp_path):
        assert torch.equal(x, torch.arange(10.0))


def test_a_missing_tensor_is_one_sentence(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    with pytest.raises(UserError, match="cannot be read"):
        load(inspect(tmp_path / "step_1"), {"other": torch.zeros(2)})


def test_facts_are_readable(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    content = json.loads((tmp_path / "step_3" / FACTS).read_text())
    assert content["facts"] == {"step": 3, "samples": 30}
    assert set(content["sizes"]) == {".metadata", "__0_0.distcp", "note.txt"}
