"""A plan as a picture: ranks downwards, time to the right, a block for every group.

In a terminal the width of a micro-batch follows its time (its fixed cost left out), and ranks that do the same all step share
a row. A PNG is to scale.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from longhaul.launcher.metrics.files import replace_file
from longhaul.models.errors import UserError
from longhaul.parallel.planner import GroupPlan, Plan

# Two shades a degree, so that neighbours of one degree can be told apart; from 1 rank (blue) to many (red).
SHADES = (
    ("#3b6fb6", "#7fa6d9"), ("#2a9d8f", "#7cc9bf"), ("#6a9a3b", "#a9cc82"), ("#c9a227", "#e6cd7a"), ("#e07b39", "#f0b187"),
    ("#c8423b", "#e3908b"), ("#8e4a9e", "#c294cd"), ("#5b5b8c", "#9d9dc4"), ("#7a4b3a", "#b98f80"), ("#3d3d3d", "#8a8a8a"),
)  # fmt: skip
INK = "#1f2933"  # on the lighter shade
IDLE = "·"
LEAST_COLUMNS = 3  # of a micro-batch


def letter(degree: int, second: bool) -> str:
    """Fill of a block where there are no colours: a for 1 rank, b for 2, c for 4; capitals tell neighbours apart."""
    fill = chr(ord("a") + degree.bit_length() - 1)
    return fill.upper() if second else fill


def shade(degree: int, second: bool) -> str:
    return SHADES[min(degree.bit_length() - 1, len(SHADES) - 1)][second]


def columns_of(plan: Plan, width: int) -> list[int]:
    """Columns of each micro-batch, by time, for strips of at most `width` columns."""
    longest = [max(group.time for group in batch.groups) for batch in plan.micro_batches]
    fair = (width - len(longest)) / sum(longest)  # a column stays free after each
    return [min(width - 1, max(LEAST_COLUMNS, round(time * fair))) for time in longest]


def cells(plan: Plan, batch: int, columns: int, ranks: int) -> list[tuple[GroupPlan | None, int, bool]]:
    """For each rank: its group in a micro-batch, the columns that it fills (at least one), and which of the two shades."""
    groups = plan.micro_batches[batch].groups
    longest = max(group.time for group in groups)
    row: list[tuple[GroupPlan | None, int, bool]] = [(None, 0, False)] * ranks
    for group in groups:
        second = bool(group.ranks.start // group.degree % 2)
        filled = max(1, min(columns, round(columns * group.time / longest)))
        for rank in group.ranks:
            row[rank] = (group, filled, second)
    return row


def draw(plan: Plan, ranks: int, console: Console) -> None:
    """Print the picture."""
    colour = console.color_system is not None and not console.no_color
    label = len(f"{ranks - 1}-{ranks - 1}") + 1
    columns = columns_of(plan, max(console.width - label - 1, 2 * LEAST_COLUMNS))
    for strip in _strips(columns, console.width - label - 1):
        heading = Text(" " * label)
        for batch in strip:
            heading.append(f"{batch + 1}"[: columns[batch]].ljust(columns[batch] + 1), style="dim")
        console.print(heading, overflow="crop", no_wrap=True)
        table = [cells(plan, batch, columns[batch], ranks) for batch in strip]
        rows = [[part[rank] for part in table] for rank in range(ranks)]
        first = 0
        while first < ranks:
            last = first
            while last + 1 < ranks and rows[last + 1] == rows[first]:
                last += 1
            name = str(first) if first == last else f"{first}-{last}"
            line = Text(name.rjust(label - 1) + " ", style="dim")
            for batch, (group, filled, second) in zip(strip, rows[first]):
                if group is not None:
                    text = "█" if colour else letter(group.degree, second)
                    line.append(text * filled, style=f"not dim {shade(group.degree, second)}")
                line.append(IDLE * (columns[batch] - filled) + " ", style="dim")
            console.print(line, overflow="crop", no_wrap=True)
            first = last + 1
    _legend(plan, console, colour)


def _strips(columns: Sequence[int], width: int) -> list[list[int]]:
    """Micro-batches side by side, as many as fit a line."""
    strips: list[list[int]] = [[]]
    used = 0
    for batch, wide in enumerate(columns):
        if strips[-1] and used + wide + 1 > width:
            strips.append([])
            used = 0
        strips[-1].append(batch)
        used += wide + 1
    return strips


def _legend(plan: Plan, console: Console, colour: bool) -> None:
    degrees = sorted({group.degree for batch in plan.micro_batches for group in batch.groups})
    line = Text("ranks a group: ", style="dim")
    for degree in degrees:
        for second in (False, True):
            line.append("█" if colour else letter(degree, second), style=f"not dim {shade(degree, second)}")
        line.append(f" {degree}   ")
    line.append(f"{IDLE} waiting")
    console.print(line)


def save_png(plan: Plan, ranks: int, path: Path, title: str) -> None:
    """Write the picture to a file, to scale."""
    # No pyplot: the user's backend is left alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    figure = Figure(figsize=(12.0, min(12.0, 2.2 + 0.11 * max(ranks, 12))), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    start = 0.0
    degrees = set()
    for number, batch in enumerate(plan.micro_batches):
        longest = max(group.time for group in batch.groups)
        bias = max(0.0, batch.time - longest)
        axes.add_patch(Rectangle((start, 0), bias, ranks, facecolor="#d5dbe3", linewidth=0))
        for group in batch.groups:
            degrees.add(group.degree)
            first = group.ranks.start
            second = bool(first // group.degree % 2)
            place = (start + bias, first)
            axes.add_patch(
                Rectangle(place, group.time, group.degree, fc=shade(group.degree, second), edgecolor="white", linewidth=0.4)
            )
            if group.degree * 64 >= ranks * 6 and longest > 0.03 * plan.time:
                middle = (place[0] + group.time / 2, first + group.degree / 2)
                name = f"{len(group.documents)} doc{'s' if len(group.documents) > 1 else ''}\n{_short(group.tokens)}"
                axes.annotate(name, middle, ha="center", va="center", fontsize=6.5, color=INK if second else "white")
        axes.text(start + batch.time / 2, -0.015 * ranks, str(number + 1), ha="center", va="bottom", fontsize=7, color="#6b7785")
        start += batch.time
    axes.set_xlim(0, start)
    axes.set_ylim(ranks, -0.05 * ranks)
    axes.set_xlabel("seconds")
    axes.set_ylabel("rank")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [
        Patch(facecolor=shade(degree, False), label=f"{degree} rank{'s' if degree > 1 else ''}") for degree in sorted(degrees)
    ]
    handles += [Patch(facecolor="#d5dbe3", label="fixed cost"), Patch(facecolor="white", edgecolor="#d5dbe3", label="waiting")]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=7, frameon=False)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    write_file(path, data.getvalue(), "--png")


def _short(tokens: int) -> str:
    return f"{tokens / 1000:.0f}K" if tokens >= 10_000 else str(tokens)


def write_file(path: Path, content: bytes, flag: str) -> None:
    """Replace a file as a whole, or say why that cannot be."""
    try:
        replace_file(path, content)
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written ({error.strerror}): give a path in a folder that exists.") from None
