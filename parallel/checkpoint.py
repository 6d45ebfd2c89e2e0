"""Checkpoints of a run: complete or not there at all.

A checkpoint is written to `step_N.tmp` and renamed when every process has finished and every byte is on the disk; then
`LATEST` is replaced. So a crash, a signal or a full disk at any moment leaves the ones before it as they were.

    folder/LATEST                   name of the newest one
    folder/step_N/*.distcp          tensors, in torch's distributed format: any number of processes can read them
    folder/step_N/checkpoint.json   facts of the run (step, samples, fingerprint) and the sizes of all files
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as read_tensors
from torch.distributed.checkpoint.state_dict_saver import save as write_tensors
from torch.distributed.tensor import DTensor

from longhaul.models.errors import UserError

from .pieces import Pieces
from .runtime import Runtime

FACTS = "checkpoint.json"
LATEST = "LATEST"
_NAME = re.compile(r"step_(\d+)")


class SaveError(UserError):
    """A checkpoint could not be written; earlier ones are as they were."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    facts: dict[str, Any]
    """What `Checkpoints.save` was given."""

    @property
    def step(self) -> int:
        return int(self.facts["step"])


def inspect(path: Path) -> Checkpoint:
    """Open a checkpoint's facts and check that all of it is there.

    Raises:
        UserError: something is missing or cut off.
    """
    try:
        content = json.loads((path / FACTS).read_text())
        facts, sizes = content["facts"], content["sizes"]
    except FileNotFoundError:
        raise UserError(f"{path} is not a complete checkpoint: {FACTS} is missing.") from None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a complete checkpoint: {FACTS} cannot be read ({error}).") from None
    for name, size in sizes.items():
        file = path / name
        found = file.stat().st_size if file.exists() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise UserError(f"{path} is not a complete checkpoint: {name} {state}.")
    return Checkpoint(path, facts)


def steps_in(folder: Path) -> list[tuple[int, Path]]:
    """Every `step_N` in a run's folder, newest first, whether good or not."""
    found = []
    for path in folder.glob("step_*"):
        match = _NAME.fullmatch(path.name)
        if match:
            found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def find(path: Path) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint that `path` means: itself, or the one `LATEST` names, or the newest good one of a run's folder.

    Returns:
        The checkpoint, or None if there is none at all, and a sentence for each bad one that was passed over.

    Raises:
        UserError: there are checkpoints, but no good one.
    """
    if _NAME.fullmatch(path.name) and not (path / LATEST).exists():
        return inspect(path), []
    candidates = [candidate for _, candidate in steps_in(path)]
    try:
        named = path / (path / LATEST).read_text().strip()
        candidates = [named, *(candidate for candidate in candidates if candidate != named)]
    except OSError:
        pass  # never written, or lost: the folders speak for themselves
    bad: list[str] = []
    for candidate in candidates:
        try:
            return inspect(candidate), bad
        except UserError as error:
            bad.append(str(error))
    if bad:
        raise UserError(f"{bad[0]} No good checkpoint is left in {path}: move it away or give another checkpoint.folder.")
    return None, []


class Checkpoints:
    """Writes the checkpoints of one run.

    Made on every process. Saving copies the state and returns; a thread writes. Its collectives have a group of their
    own, because those of training go on at the same time.

    Args:
        folder: the run's folder, seen by every process.
        runtime: this process.
        keep: how many of the newest stay; 0 keeps all.
        background: False waits for the disk in `save`.
    """

    def __init__(self, folder: Path, runtime: Runtime, keep: int = 2, background: bool = True) -> None:
        self.folder, self.keep, self.background = folder, keep, background
        self._main = runtime.is_main
        self._group: dist.ProcessGroup | None = None
        if runtime.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=runtime.timeout)
        self._thread: threading.Thread | None = None
        self._error: SaveError | None = None
        self.last_good: Path | None = None

    def save(
        self, step: int, state: Mapping[str, Tensor], facts: Mapping[str, Any], texts: Mapping[str, str] | None = None
    ) -> None:
        """Write `state` as `step_N`. Waits for the save before.

        Args:
            step: steps done; names the checkpoint.
            state: tensors by name; a name's tensor is alike on every process that has it, or a DTensor, or `Pieces` of a
                whole one. A process may lack names.
            facts: what JSON can hold; from the main process.
            texts: small files to lie beside the tensors, by name; from the main process.

        Raises:
            SaveError: this save (if not in the background) or the one before failed, on every process alike.
        """
        self.wait()
        staged = {name: _copy(tensor) for name, tensor in state.items()}
        facts = {"step": step, **facts}
        arguments = (step, staged, facts, dict(texts or {}))
        self._thread = threading.Thread(target=self._run, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()
        if not self.background:
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way; raise `SaveError` if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, step: int, staged: dict[str, Tensor], facts: dict[str, Any], texts: dict[str, str]) -> None:
        path = self.folder / f"step_{step}"
        temporary = path.with_name(path.name + ".tmp")
        # In steps, and all processes agree after each: none may wait for one that has given up.
        reason = self._agree(lambda: _clear(temporary) if self._main else None)
        reason = reason or self._agree(lambda: _write(temporary, staged, self._group))
        reason = reason or self._agree(lambda: self._publish(temporary, path, facts, texts) if self._main else None)
        if reason is None:
            self.last_good = path
            return
        if self._main:
            shutil.rmtree(temporary, ignore_errors=True)
        kept = f"the last good one is {self.last_good}" if self.last_good else "there is none before it"
        self._error = SaveError(
            f"Checkpoint {path} could not be written ({reason}); {kept}: make room there or mend the folder."
        )

    def _agree(self, work: Any) -> str | None:
        """Do `work`; returns why it failed on the lowest process on which it did, the same on all, else None."""
        reason: str | None = None
        try:
            work()
        except (Exception, CheckpointException) as error:  # whatever it is, the run must hear of it
            reason = _reason(error)
        if self._group is None:
            return reason
        reasons: list[str | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(reasons, reason, group=self._group)
        return next((each for each in reasons if each is not None), None)

    def _publish(self, temporary: Path, path: Path, facts: dict[str, Any], texts: dict[str, str]) -> None:
        for name, text in texts.items():
            write_atomically(temporary / name, text)
        sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        write_atomically(temporary / FACTS, json.dumps({"facts": facts, "sizes": sizes}, indent=1))
        if path.exists():  # a run that went on from an earlier step comes by again
            old = path.with_name(path.name + ".old.tmp")
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.rename(path)
        _sync(self.folder)
        write_atomically(self.folder / LATEST, path.name + "\n")
        if self.keep:
            others = [other for _, other in steps_in(self.folder) if other != path]
            for other in others[self.keep - 1 :]:
                # Renamed first: a folder half deleted would look like a damaged checkpoint.
                doomed = other.with_name(other.name + ".tmp")
                shutil.rmtree(doomed, ignore_errors=True)
                other.rename(doomed)
                shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Delete what interrupted saves left behind. For the main process, before training."""
    for path in folder.glob("step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def tensor_shapes(checkpoint: Checkpoint) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of every tensor of a checkpoint, by name."""
    metadata = FileSystemReader(checkpoint.path).read_metadata()
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def load(checkpoint: Checkpoint, state: dict[str, Tensor], together: bool = True) -> None:
    """Fill the tensors of `state` in place, whatever topology wrote them.

    Args:
        checkpoint: a complete one.
        state: tensors by name; DTensors get their shard, `Pieces` their rectangles.
        together: every process of the job calls this; False: this process alone reads whole tensors.

    Raises:
        UserError: a file is damaged, or lacks a tensor.
    """
    alone = not (together and dist.is_available() and dist.is_initialized())
    try:
        with _no_warning_about_one_process():
            read_tensors(state, storage_reader=FileSystemReader(checkpoint.path), no_dist=alone)
    except CheckpointException as error:
        raise UserError(f"{checkpoint.path} cannot be read ({_reason(error)}): resume from another checkpoint.") from error


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by `text`: readers see the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def _write(folder: Path, staged: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    with _no_warning_about_one_process():
        write_tensors(staged, storage_writer=FileSystemWriter(folder), process_group=group, no_dist=group is None)


@contextmanager
def _no_warning_about_one_process() -> Iterator[None]:
    """One process without a group is a use of ours, of which torch warns each time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU that training does not touch; of a DTensor, of the shard held here."""
    if isinstance(tensor, Pieces):
        return tensor.copied()
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        local = tensor.to_local().to("cpu", copy=True)
        return DTensor.from_local(
            local,
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
    return tensor.to("cpu", copy=True)


def _sync(folder: Path) -> None:
    """Make a rename in `folder` survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    """One line of why, for a person."""
    if isinstance(error, CheckpointException):
        causes = [cause for cause, _ in error.failures.values()]
        error = next((cause for cause in causes if isinstance(cause, OSError)), causes[0] if causes else error)
    if isinstance(error, OSError) and error.errno is not None:
        name = "no space left on the disk" if error.errno == errno.ENOSPC else os.strerror(error.errno)
        return name if error.filename is None else f"{name}: {error.filename}"
    return (str(error) or type(error).__name__).splitlines()[0]
