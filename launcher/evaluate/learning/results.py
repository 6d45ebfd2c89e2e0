"""Outcomes on disk, one line a run, so that an interrupted table goes on where it ended."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict
from pathlib import Path

import longhaul.models
from longhaul.launcher.lines import LinesFile, fingerprint_of

from .train import Outcome, Run


@functools.cache
def sources() -> str:
    """The fingerprint of the sources that an outcome depends on, and of torch."""
    here = Path(__file__).parent
    return fingerprint_of([*map(Path, longhaul.models.__path__), here / "tasks.py", here / "train.py"])


def key(run: Run) -> str:
    """Equal for equal runs."""
    return json.dumps(asdict(run), sort_keys=True)


class ResultsFile:
    """Outcomes by the key of their run.

    Args:
        path: JSON lines; made when the first outcome comes.
    """

    def __init__(self, path: Path) -> None:
        self._file = LinesFile(path, sources())

    def read(self) -> dict[str, Outcome]:
        """The outcomes of this program."""
        found: dict[str, Outcome] = {}
        for fields in self._file.lines():
            try:
                outcome = fields["outcome"]
                outcome["accuracy"] = {int(length): value for length, value in outcome["accuracy"].items()}
                found[key(Run(**fields["run"]))] = Outcome(**outcome)
            except (ValueError, TypeError, KeyError, AttributeError):
                continue  # of another program
        return found

    def append(self, run: Run, outcome: Outcome) -> None:
        """Add a line, whole or not at all."""
        self._file.write({"run": asdict(run), "outcome": asdict(outcome)})
