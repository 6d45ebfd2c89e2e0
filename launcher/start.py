"""Where a run begins: its data, its folder, and the checkpoint it goes on from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from longhaul.models.errors import UserError
from longhaul.parallel.checkpoint import Checkpoint, find, remove_leftovers, steps_in, write_atomically
from longhaul.parallel.runtime import Runtime

from .config import TrainConfig
from .data import Data, load_data
from .load import RESOLVED
from .parsing import to_yaml
from .state import check_fingerprint


def find_start(config: TrainConfig, expected: dict[str, Any]) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to go on from, if any, and what there is to say about others."""
    folder, resume = Path(config.checkpoint.folder), config.checkpoint.resume
    if resume == "never":
        present = steps_in(folder)
        if present and config.checkpoint.every:
            raise UserError(
                f"checkpoint.folder {folder} already holds {present[0][1].name} and checkpoint.resume is never: give "
                "another folder, or auto to go on."
            )
        return None, []
    path = folder if resume == "auto" else Path(resume)
    if resume != "auto" and not path.is_dir():
        raise UserError(f"checkpoint.resume {resume} does not exist: give auto, never or a folder with a checkpoint.")
    checkpoint, passed_over = find(path)
    if checkpoint is None:
        if resume != "auto":
            raise UserError(f"checkpoint.resume {resume} holds no checkpoint: give a run's folder or one step_N of it.")
        return None, []
    own = checkpoint.path.resolve().parent == folder.resolve()
    if not own and steps_in(folder) and config.checkpoint.every:
        raise UserError(
            f"checkpoint.folder {folder} already holds {steps_in(folder)[0][1].name} of its own: to go on from "
            f"{checkpoint.path}, give another checkpoint.folder."
        )
    check_fingerprint(checkpoint, expected)
    return checkpoint, [f"warning: {message}" for message in passed_over]


def make_folder(folder: Path) -> None:
    """The run's folder; UserError if it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot make checkpoint.folder {folder} ({error.strerror}): give another one.") from None


def claim_folder(config: TrainConfig, parameters: int) -> None:
    """Clear what interrupted saves left, see that a checkpoint has room, and write the resolved configuration."""
    folder = Path(config.checkpoint.folder)
    remove_leftovers(folder)
    copies = 3 if config.optimizer.name == "adamw" else 1
    needed = parameters * 4 * copies if config.checkpoint.every else 0
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"A checkpoint needs {needed / 2**20:.0f} MiB, but {folder} has only {free / 2**20:.0f} MiB free: make room or "
            "give another checkpoint.folder."
        )
    try:
        write_atomically(folder / RESOLVED, to_yaml(config))
    except OSError as error:
        raise UserError(f"Cannot write to checkpoint.folder {folder} ({error.strerror}): give another one.") from None


def load_on_every_machine(config: TrainConfig, runtime: Runtime) -> Data:
    """One process of each machine reads documents and fills the cache of tokens, then the others find it."""
    data: Data | None = None
    for turn in (True, False):
        error: UserError | None = None
        if (runtime.local_rank == 0) == turn:
            try:
                data = load_data(config.data)
            except UserError as mistake:
                error = mistake
        runtime.agree_on_error(error)
    assert data is not None
    return data


def check_vocabulary(config: TrainConfig, data: Data) -> None:
    """UserError if the tokenizer knows tokens that the model does not."""
    if config.model.vocab_size < data.vocab_size:
        masks = " and one for the masks of data.prefix_length" if config.data.prefix_length else ""
        raise UserError(
            f"model.vocab_size {config.model.vocab_size} is smaller than the tokenizer's "
            f"{data.tokenizer.vocab_size}{masks}: raise it to at least {data.vocab_size}, best a multiple of 8."
        )
