"""Verdicts on cells, and the file they are kept in: one line a cell, appended in one write.

An interrupted run leaves whole lines (or one broken last line, which is passed over), so a rerun goes on where it ended. A
line counts only for the program that wrote it: it names a fingerprint of the sources.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import longhaul.models
import longhaul.parallel
from longhaul.models.errors import UserError

from .cells import TOLERANCE, Cell
from .ranks import Answer

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

    cell: Cell
    status: str
    seconds: float = 0.0
    worst: float = 0.0
    """The worst relative error of what is held to the tolerance of the dtype."""
    failures: tuple[Failure, ...] = ()
    message: str = ""
    """Why it was refused, or how it broke."""


def judge(cell: Cell, answers: Sequence[Answer], seconds: float) -> Verdict:
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
def fingerprint() -> str:
    """Of the sources that a verdict depends on, and of torch."""
    digest = hashlib.sha256(torch.__version__.encode())
    roots = [Path(folder) for package in (longhaul.models, longhaul.parallel) for folder in package.__path__]
    for root in [*roots, Path(__file__).parent]:
        for path in sorted(root.rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


class ResultsFile:
    """Verdicts on disk.

    Args:
        path: JSON lines; made when the first verdict comes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[Cell, Verdict]:
        """The last verdict of this program on each cell; failed ones are left out, to be run again."""
        if not self.path.exists():
            return {}
        found: dict[Cell, Verdict] = {}
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--results {self.path} cannot be read ({error}): give another file.") from None
        for line in lines:
            try:
                fields = json.loads(line)
                if fields["fingerprint"] != fingerprint():
                    continue
                cell = Cell(**fields["cell"])
            except (json.JSONDecodeError, TypeError, KeyError):
                continue  # a broken line of an interrupted write, or of another program
            if fields["status"] == FAILED:
                found.pop(cell, None)
            else:
                found[cell] = Verdict(cell, fields["status"], fields["seconds"], fields["worst"], (), fields["message"])
        return found

    def append(self, verdict: Verdict) -> None:
        """Add a line, whole or not at all."""
        line = json.dumps({"fingerprint": fingerprint(), **as_json(verdict)})
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


def as_json(verdict: Verdict) -> dict[str, object]:
    """Plain JSON; an infinite error is null's stand-in, a string."""
    fields = asdict(verdict) | {"cell": verdict.cell._asdict()}
    fields["failures"] = [{**asdict(failure), "value": _finite(failure.value)} for failure in verdict.failures]
    fields["worst"] = _finite(verdict.worst)
    return fields


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else "inf"
