"""Outcomes on disk: one line a run, appended in one write, so that an interrupted table goes on where it ended.

A line counts only for the program that wrote it: it names a fingerprint of the sources.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch

import longhaul.models
from longhaul.models.errors import UserError

from .train import Outcome, Run


@functools.cache
def fingerprint() -> str:
    """Of the sources that an outcome depends on, and of torch."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in [path for folder in longhaul.models.__path__ for path in sorted(Path(folder).rglob("*.py"))]:
        digest.update(path.read_bytes())
    for name in ("tasks.py", "train.py"):
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()[:12]


def key(run: Run) -> str:
    """Equal for equal runs."""
    return json.dumps(asdict(run), sort_keys=True)


class ResultsFile:
    """Outcomes by the key of their run.

    Args:
        path: JSON lines; made when the first outcome comes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Outcome]:
        """The outcomes of this program."""
        if not self.path.exists():
            return {}
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--results {self.path} cannot be read ({error}): give another file.") from None
        found: dict[str, Outcome] = {}
        for line in lines:
            try:
                fields = json.loads(line)
                if fields["fingerprint"] == fingerprint():
                    outcome = fields["outcome"]
                    outcome["accuracy"] = {int(length): value for length, value in outcome["accuracy"].items()}
                    found[key(Run(**fields["run"]))] = Outcome(**outcome)
            except (ValueError, TypeError, KeyError, AttributeError):
                continue  # a broken line of an interrupted write, or of another program
        return found

    def append(self, run: Run, outcome: Outcome) -> None:
        """Add a line, whole or not at all."""
        line = json.dumps({"fingerprint": fingerprint(), "run": asdict(run), "outcome": asdict(outcome)})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                size = os.fstat(handle).st_size
                broken = size and os.pread(handle, 1, size - 1) != b"\n"
                os.write(handle, (("\n" if broken else "") + line + "\n").encode())
            finally:
                os.close(handle)
        except OSError as error:
            raise UserError(f"--results {self.path} cannot be written ({error.strerror}): give another file.") from None
