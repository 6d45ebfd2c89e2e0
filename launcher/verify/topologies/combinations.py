"""docs/combinations.md, from verdicts: what was run together, how exactly it agreed, and what is refused."""

from __future__ import annotations

import datetime
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from longhaul.models.errors import UserError
from longhaul.parallel.checkpoint import write_atomically

from ..results import REFUSED, Verdict
from .cases import BACKENDS, CHECKPOINTING, ENGINES, OPTIONS, SCHEDULES, TOPOLOGIES, Case
from .job import STEPS
from .models import MODELS

COMMAND = "longhaul verify --topologies{all} --markdown docs/combinations.md"
WHOLE = "It is the whole list, which `make verify` runs again."
SPREAD = "It is the spread of cases that the tests run; `make verify` runs the whole list."
HEAD = """\
# Combinations

Made by `{command}` at commit {commit} on {date}, torch {torch}. Nothing here is written by hand. {list}

Each of the {run} cases below is a run of the trainer on a tiny model, packed documents and masked tokens, on processes of one
machine (CPU, gloo). Compared with one process: every gradient at step 1 and every parameter after {steps} steps, on every
process; all losses and gradient norms; the held-out loss. Allowed are 1e-10 in fp64 and 1e-5 in fp32 (RMS over RMS);
DeepSpeed's ZeRO runs in fp32. The worst seen: {worst}. With recomputation a step has as many messages of
every kind as without: no forward is sent again in a backward. {refused} combinations are refused before the first step.

Meshes: dp data, sp sequence, tp tensor, pp pipeline, ep expert parallel processes. zero1 to zero3 are stages of ZeRO.
"""


def write(path: Path, verdicts: Sequence[Verdict], whole: bool) -> None:
    """Write the file, whole or not at all.

    Args:
        whole: the verdicts are on the whole list, not on the spread of it.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text(verdicts, whole))
    except OSError as error:
        raise UserError(f"--markdown {path} cannot be written ({error.strerror}): give another file.") from None


def text(verdicts: Sequence[Verdict], whole: bool) -> str:
    """The document."""
    ran = [verdict for verdict in verdicts if verdict.status != REFUSED]
    worst = {dtype: max((v.worst for v in ran if v.cell.dtype == dtype), default=0.0) for dtype in ("fp64", "fp32")}
    parts = [
        HEAD.format(
            command=COMMAND.format(all=" --all" if whole else ""),
            list=WHOLE if whole else SPREAD,
            commit=_commit(),
            date=datetime.date.today().isoformat(),
            torch=torch.__version__,
            run=len(ran),
            steps=STEPS,
            worst=", ".join(f"{value:.1e} in {dtype}" for dtype, value in worst.items()),
            refused=len(verdicts) - len(ran),
        )
    ]
    parts.append("## Mesh and backend, by model\n\nThe worst relative error in that cell's runs, and how many they were.\n")
    for model in MODELS:
        own = [verdict for verdict in ran if _case(verdict).model == model]
        parts.append(f"### {model}\n\n" + _table("mesh", TOPOLOGIES, BACKENDS, own, "topology", "backend"))
    parts.append("## Schedules of pipelines\n\n" + _table("mesh", TOPOLOGIES, SCHEDULES, ran, "topology", "schedule"))
    parts.append("## Recomputation\n\n" + _table("backend", BACKENDS, CHECKPOINTING, ran, "backend", "checkpointing"))
    parts.append(_table("schedule", SCHEDULES, CHECKPOINTING, ran, "schedule", "checkpointing"))
    engines = "; ".join(
        f"{name}: " + (", ".join(f"{key} {value}" for key, value in keys.items()) or "all_gather, contiguous")
        for name, keys in ENGINES.items()
    )
    sharing = [verdict for verdict in ran if _case(verdict).degrees.sequence > 1]
    table = _table("model", MODELS, ENGINES, sharing, "model", "engines")
    parts.append(f"## Engines\n\nOn meshes with sp: {engines}.\n\n{table}")
    options = [verdict for verdict in ran if _case(verdict).option]
    parts.append(
        "## Streams in chunks, planned steps\n\n"
        + _table("mesh", TOPOLOGIES, [name for name in OPTIONS if name], options, "topology", "option")
    )
    parts.append("## Refused\n\n" + "".join(_refusals(verdicts)))
    parts.append("## Every case\n\n" + "".join(_every(ran)))
    return "\n".join(parts)


def keys_in(document: str) -> set[str]:
    """The cases a document says were run or refused, by their keys."""
    lines = [line.split("`") for line in document.splitlines() if line.startswith("- `")]
    return {line[1] for line in lines}


def _case(verdict: Verdict) -> Case:
    assert isinstance(verdict.cell, Case)
    return verdict.cell


def _table(
    corner: str, rows: Iterable[str], columns: Iterable[str], verdicts: Sequence[Verdict], row: str, column: str
) -> str:
    """Rows and columns in which something was run."""
    groups: dict[tuple[str, str], list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        groups[getattr(verdict.cell, row), getattr(verdict.cell, column)].append(verdict)
    heads = [name for name in columns if any(key[1] == name for key in groups)]
    lines = [f"| {corner} | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for name in rows:
        if any((name, head) in groups for head in heads):
            cells = [_entry(groups.get((name, head), [])) for head in heads]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _entry(verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return ""
    return f"{max(verdict.worst for verdict in verdicts):.0e} ({len(verdicts)})"


def _refusals(verdicts: Sequence[Verdict]) -> Iterable[str]:
    for verdict in verdicts:
        if verdict.status == REFUSED:
            yield f"- `{verdict.cell.key}`: {verdict.message}\n"


def _every(verdicts: Sequence[Verdict]) -> Iterable[str]:
    for verdict in sorted(verdicts, key=lambda verdict: (MODELS.index(_case(verdict).model), verdict.cell.ranks)):
        yield f"- `{verdict.cell.key}`: {verdict.worst:.1e}\n"


def _commit() -> str:
    """Of the sources, if they lie in a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
