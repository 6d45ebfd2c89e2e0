"""What a person sees: progress, a table by mixer and engine, and every failure by tensor, rank and worst error."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from longhaul.models.errors import UserError

from .results import FAILED, PASSED, REFUSED, Verdict, as_json

SHOWN = 20  # failed cells that are printed one by one


class Display:
    """Progress over cells: a bar on a terminal, a line every tenth elsewhere.

    Args:
        total: cells to run.
    """

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total, self.done, self.failed = console, total, 0, 0
        self.progress: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.progress = Progress(*columns, console=console, transient=True)
            self.task = self.progress.add_task("verifying", total=total)
            self.progress.start()

    def add(self, verdict: Verdict) -> None:
        """One more is done."""
        self.done += 1
        self.failed += verdict.status == FAILED
        if self.progress is not None:
            self.progress.update(self.task, completed=self.done, description=f"{verdict.cell.key}, {self.failed} failed")
        elif self.done * 10 // self.total > (self.done - 1) * 10 // self.total:
            self.console.print(f"{self.done} of {self.total} cells, {self.failed} failed", highlight=False)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()


def summarise(console: Console, verdicts: Sequence[Verdict]) -> None:
    """The table, the refusals and the failures."""
    rows: dict[tuple[str, str], list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        rows[verdict.cell.mixer, verdict.cell.engine].append(verdict)
    engines = list(dict.fromkeys(engine for _, engine in rows))
    mixers = sorted({mixer for mixer, _ in rows})
    table = Table(title="cells passed / run, and the worst relative error", title_justify="left")
    table.add_column("mixer")
    for name in ("cells", "passed", "failed", "refused"):
        table.add_column(name, justify="right")
    table.add_column("worst fp64", justify="right")
    table.add_column("worst fp32", justify="right")
    for mixer in mixers:
        own = [verdict for engine in engines for verdict in rows.get((mixer, engine), ())]
        counts = Counter(verdict.status for verdict in own)
        style = "red" if counts[FAILED] else ""
        worst = [_worst(own, dtype) for dtype in ("fp64", "fp32")]
        table.add_row(mixer, *map(str, (len(own), counts[PASSED], counts[FAILED], counts[REFUSED])), *worst, style=style)
    console.print(table)
    _engines(console, verdicts)
    refusals = Counter(verdict.message for verdict in verdicts if verdict.status == REFUSED)
    for message, count in refusals.items():
        console.print(f"refused ({count}): {message}", highlight=False, markup=False, soft_wrap=True)
    end(console, verdicts, "cells")


def _engines(console: Console, verdicts: Sequence[Verdict]) -> None:
    table = Table(title="by exchange or attention engine, and layout", title_justify="left")
    layouts = list(dict.fromkeys(verdict.cell.layout for verdict in verdicts))
    table.add_column("engine")
    for layout in layouts:
        table.add_column(layout.replace("_per_", "\nper "), justify="right")
    groups: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for verdict in verdicts:
        groups[verdict.cell.engine, verdict.cell.layout][verdict.status] += 1
    for engine in sorted({verdict.cell.engine for verdict in verdicts}):
        entries = []
        for layout in layouts:
            counts = groups[engine, layout]
            run = counts[PASSED] + counts[FAILED]
            text = f"{counts[PASSED]}/{run}" if run else "refused" if counts[REFUSED] else ""
            entries.append(f"[red]{text}[/red]" if counts[FAILED] else text)
        table.add_row(engine, *entries)
    console.print(table)


def _worst(verdicts: Sequence[Verdict], dtype: str) -> str:
    values = [v.worst for v in verdicts if v.cell.dtype == dtype and v.status == PASSED]
    return f"{max(values):.1e}" if values else ""


def end(console: Console, verdicts: Sequence[Verdict], things: str, remark: str = "") -> None:
    """The failures, and the counts."""
    failed = [verdict for verdict in verdicts if verdict.status == FAILED]
    for verdict in failed[:SHOWN]:
        describe(console, verdict)
    if len(failed) > SHOWN:
        console.print(f"and {len(failed) - SHOWN} more failed {things}; --json FILE has them all.", highlight=False)
    counts = Counter(verdict.status for verdict in verdicts)
    console.print(
        f"{counts[PASSED]} passed, {counts[FAILED]} failed, {counts[REFUSED]} refused before the first step{remark}.",
        highlight=False,
    )


def describe(console: Console, verdict: Verdict) -> None:
    """One failed cell."""
    named = ", ".join(f"{axis} {value}" for axis, value in verdict.cell._asdict().items())
    console.print(f"failed: {named}", style="red", highlight=False, soft_wrap=True)
    for failure in verdict.failures[:6]:
        value = f"{failure.value:.1e}" if math.isfinite(failure.value) else "not a number, or another shape"
        allowed = f"allowed {failure.limit:g}" if failure.limit else "no bit may change"
        console.print(f"    {failure.tensor}, rank {failure.rank}: {value} ({allowed})", highlight=False, soft_wrap=True)
    if len(verdict.failures) > 6:
        console.print(f"    and {len(verdict.failures) - 6} more tensors", highlight=False)
    if verdict.message:
        console.print("    " + verdict.message.replace("\n", "\n    "), markup=False, highlight=False, soft_wrap=True)


def write_json(path: Path, document: dict[str, object]) -> None:
    """Write a JSON document, whole or not at all."""
    scratch = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        raise UserError(f"--json {path} cannot be written ({error.strerror}): give another file.") from None


def verdicts_json(verdicts: Sequence[Verdict]) -> dict[str, object]:
    """The matrix as a document."""
    counts = Counter(verdict.status for verdict in verdicts)
    return {
        "passed": counts[PASSED],
        "failed": counts[FAILED],
        "refused": counts[REFUSED],
        "cells": [as_json(verdict) for verdict in verdicts],
    }
