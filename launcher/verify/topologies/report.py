"""What a person sees of the topologies: a table by model and mesh, refusals with their reasons, and every failure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ..report import end
from ..results import PASSED, REFUSED, Verdict
from .cases import TOPOLOGIES


def summarise(console: Console, verdicts: Sequence[Verdict]) -> None:
    """The table, the refusals and the failures."""
    groups: dict[tuple[str, str], list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        if not verdict.cell.refused:
            groups[verdict.cell.model, verdict.cell.topology].append(verdict)
    models = list(dict.fromkeys(model for model, _ in groups))
    table = Table(title="cases passed / run, by mesh and model", title_justify="left")
    table.add_column("mesh")
    for model in models:
        table.add_column(model, justify="right")
    for topology in TOPOLOGIES:
        entries = []
        for model in models:
            own = groups[model, topology]
            passed = sum(verdict.status == PASSED for verdict in own)
            text = f"{passed}/{len(own)}" if own else ""
            entries.append(f"[red]{text}[/red]" if passed < len(own) else text)
        if any(entries):
            table.add_row(topology, *entries)
    console.print(table)
    for dtype in ("fp64", "fp32"):
        worst = max((v.worst for v in verdicts if v.cell.dtype == dtype and v.status == PASSED), default=None)
        if worst is not None:
            console.print(f"worst relative error in {dtype}: {worst:.1e}", highlight=False)
    for verdict in verdicts:
        if verdict.status == REFUSED:
            console.print(f"refused: {verdict.cell.key}: {verdict.message}", highlight=False, markup=False, soft_wrap=True)
    end(console, verdicts, "cases", ", as they must be")
