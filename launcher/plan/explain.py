"""A plan as a table, as JSON, and beside static degrees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from longhaul.parallel.planner import GroupPlan, MicroBatch, Plan

from .compare import Solved, Static

MOST_ROWS = 40


def as_dict(plan: Plan) -> dict[str, Any]:
    """Plain values; `from_dict` gives an equal plan back."""
    return {
        "micro_batches": [
            {
                "time": batch.time,
                "groups": [
                    {
                        "ranks": [group.ranks.start, group.ranks.stop],
                        "documents": list(group.documents),
                        "cuts": list(group.cuts),
                        "time": group.time,
                    }
                    for group in batch.groups
                ],
            }
            for batch in plan.micro_batches
        ],
        **{name: getattr(plan, name) for name in _PLAIN},
        "gap": plan.gap,
    }


def from_dict(values: dict[str, Any]) -> Plan:
    """The plan that `as_dict` wrote."""
    batches = tuple(
        MicroBatch(
            tuple(
                GroupPlan(range(*group["ranks"]), tuple(group["documents"]), tuple(group["cuts"]), group["time"])
                for group in batch["groups"]
            ),
            batch["time"],
        )
        for batch in values["micro_batches"]
    )
    return Plan(batches, **{name: values[name] for name in _PLAIN})


_PLAIN = ("time", "memory", "bound", "candidate", "candidates", "objective", "work", "idle", "pod_ranks")


def idle_of(batch: MicroBatch, ranks: int) -> float:
    """Share of a micro-batch's rank-seconds, its fixed cost left out, in which ranks wait."""
    longest = max(group.time for group in batch.groups)
    return 1.0 - sum(group.time * group.degree for group in batch.groups) / (longest * ranks) if longest else 0.0


def degrees_of(batch: MicroBatch) -> str:
    """Groups by degree, as `1x32 6x4`: six groups of four ranks."""
    counted = Counter(group.degree for group in batch.groups)
    return " ".join(f"{count}x{degree}" for degree, count in sorted(counted.items(), reverse=True))


def plan_table(plan: Plan, lengths: Sequence[int], ranks: int) -> Table:
    """A row a micro-batch, and the sums."""
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, title="Plan of one step", title_justify="left")
    total = sum(len(group.documents) for batch in plan.micro_batches for group in batch.groups)
    footers = {
        "": "all",
        "groups x ranks": str(sum(len(batch.groups) for batch in plan.micro_batches)),
        "documents": f"{total:,}",
        "tokens": f"{sum(group.tokens for batch in plan.micro_batches for group in batch.groups):,}",
        "longest": f"{max(lengths):,}",
        "seconds": f"{plan.time:.4g}",
        "waiting": f"{plan.idle:.1%}",
    }
    for name, footer in footers.items():
        table.add_column(name, footer=footer, justify="left" if name == "groups x ranks" else "right")
    for number, batch in enumerate(plan.micro_batches[:MOST_ROWS], 1):
        members = [index for group in batch.groups for index in group.documents]
        table.add_row(
            str(number),
            degrees_of(batch),
            f"{len(members):,}",
            f"{sum(group.tokens for group in batch.groups):,}",
            f"{max(lengths[index] for index in members):,}",
            f"{batch.time:.4g}",
            f"{idle_of(batch, ranks):.1%}",
        )
    if len(plan.micro_batches) > MOST_ROWS:
        table.add_row("...", f"{len(plan.micro_batches) - MOST_ROWS} more in --json", *[""] * 5)
    return table


def comparison(plan: Plan, static: Static, solved: Solved | None) -> Table:
    """The plan beside static degrees and bounds."""
    table = Table(box=box.SIMPLE_HEAD, title="Beside what needs no planner", title_justify="left")
    for name, justify in (("", "left"), ("seconds", "right"), ("to the plan", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]

    def row(name: str, seconds: float) -> None:
        table.add_row(name, f"{seconds:.4g}", f"{seconds / plan.time:.2f}x")

    row(f"this plan ({plan.candidate})", plan.time)
    row(f"best single degree ({static.best})", static.seconds[static.best])
    row(f"fixed degree that holds the longest document ({static.fixed})", static.seconds[static.fixed])
    if solved is not None and solved.seconds is not None:
        row(f"published program on {solved.solver}{', solved' if solved.optimal else ', stopped'}", solved.seconds)
    row("no plan is faster than (area bound)", plan.bound)
    if solved is not None:
        row("no plan is faster than (configuration bound)", solved.bound)
    return table


def show(plan: Plan, lengths: Sequence[int], ranks: int, static: Static, solved: Solved | None, console: Console) -> None:
    """Print both tables."""
    console.print(plan_table(plan, lengths, ranks))
    console.print(comparison(plan, static, solved))
    bound = plan.bound if solved is None else solved.bound
    console.print(
        f"At most {plan.time / bound - 1:.1%} above the best plan there is; {plan.memory / 1e9:.3g} GB on the fullest rank.",
        highlight=False,
    )
