"""Verdicts on cells, and the file they are kept in."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import longhaul.models
import longhaul.parallel
from longhaul.launcher.lines import LinesFile, fingerprint_of

from .cells import TOLERANCE, Cell
from .ranks import Answer
from .topologies.cases import Case

PASSED, FAILED, REFUSED = "passed", "failed", "refused"


@dataclass(frozen=True)
class Failure:
    """One finding beyond its limit, at the rank where it is worst."""

    tensor: str
    rank: int
    value: float
    limit: float


@dataclass(frozen=True)
class Verdict:
    """What came of a cell."""

    cell: Any
    """A `Cell`, or a `Case` of the topologies."""
    status: str
    seconds: float = 0.0
    worst: float = 0.0
    """The worst relative error of what is held to the tolerance of the dtype."""
    failures: tuple[Failure, ...] = ()
    message: str = ""
    """Why it was refused, or how it broke."""


def judge(cell: Cell | Case, answers: Sequence[Answer], seconds: float) -> Verdict:
    """The verdict on a cell from what its ranks say."""
    broken = [(rank, found) for rank, found in enumerate(answers) if found.kind == "error"]
    if broken:
        # The rank that says most knows the cause; others only waited for it.
        rank, found = max(broken, key=lambda item: len(item[1].message))
        return Verdict(cell, FAILED, seconds, math.inf, message=f"rank {rank}: {found.message.strip()}")
    refusals = [found.message for found in answers if found.kind == "refused"]
    if refusals:
        if len(refusals) < len(answers):
            return Verdict(cell, FAILED, seconds, math.inf, message=f"only some ranks refused: {refusals[0]}")
        return Verdict(cell, REFUSED, seconds, message=refusals[0])
    failures: dict[str, Failure] = {}
    worst = 0.0
    for rank, found in enumerate(answers):
        for name, (value, limit) in found.findings.items():
            value = math.inf if math.isnan(value) else value
            worst = max(worst, value if limit == TOLERANCE[cell.dtype] else 0.0)
            if value > limit and (name not in failures or value > failures[name].value):
                failures[name] = Failure(name, rank, value, limit)
    if not any(found.findings for found in answers):
        return Verdict(cell, FAILED, seconds, math.inf, message="nothing was compared")
    ranked = tuple(sorted(failures.values(), key=lambda failure: -failure.value))
    return Verdict(cell, FAILED if ranked else PASSED, seconds, worst, ranked)


@functools.cache
def sources() -> str:
    """Of the sources that a verdict on a cell depends on, and of torch."""
    packages = (longhaul.models, longhaul.parallel)
    return fingerprint_of([*(Path(folder) for package in packages for folder in package.__path__), Path(__file__).parent])


class ResultsFile:
    """Verdicts on disk.

    Args:
        path: JSON lines; made when the first verdict comes.
        kind: of what is verified: its fields are kept.
        fingerprint: of the sources that a verdict depends on; those of cells if left out.
    """

    def __init__(self, path: Path, kind: Any = Cell, fingerprint: str | None = None) -> None:
        self.path, self.kind = path, kind
        self._file = LinesFile(path, fingerprint or sources())

    def read(self) -> dict[Any, Verdict]:
        """The last verdict of this program on each cell; failed ones are left out, to be run again."""
        found: dict[Any, Verdict] = {}
        for fields in self._file.lines():
            try:
                cell = self.kind(**fields["cell"])
                if fields["status"] == FAILED:
                    found.pop(cell, None)
                else:
                    found[cell] = Verdict(cell, fields["status"], fields["seconds"], fields["worst"], (), fields["message"])
            except (TypeError, KeyError):
                continue  # of another program
        return found

    def append(self, verdict: Verdict) -> None:
        """Add a line, whole or not at all."""
        self._file.write(as_json(verdict))


def as_json(verdict: Verdict) -> dict[str, object]:
    """Plain JSON; an infinite error is null's stand-in, a string."""
    fields = asdict(verdict) | {"cell": verdict.cell._asdict()}
    fields["failures"] = [{**asdict(failure), "value": _finite(failure.value)} for failure in verdict.failures]
    fields["worst"] = _finite(verdict.worst)
    return fields


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else "inf"
