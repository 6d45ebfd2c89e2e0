"""The command `longhaul plan memory`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from longhaul.launcher.bench.ranks import run_on_ranks
from longhaul.launcher.config import TrainConfig
from longhaul.launcher.parsing import parse
from longhaul.models.errors import UserError

from .memory import GIB, PROCESS, Part, predict_each, total
from .memory_ranks import measure
from .picture import write_file

MIB = 2**20


def main(argv: Sequence[str]) -> int:
    """Predict, and say what each part is."""
    parser = argparse.ArgumentParser(
        "longhaul plan memory",
        description="Predict the memory of one process of a run. Flags of longhaul train (--train.stream_tokens 4096) are "
        "understood.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, help="a run's configuration (default: the defaults of longhaul train)")
    parser.add_argument("--processes", type=int, default=1, help="of the run (default: %(default)s)")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="also run two steps on this machine, on CPUs with as many processes, and show what their tensors took",
    )
    parser.add_argument("--json", type=Path, help="also write the prediction to this file")
    options, rest = parser.parse_known_args(list(argv))
    if options.processes < 1:
        raise UserError(f"--processes is {options.processes}: give at least 1.")
    config = parse([*(["--config", str(options.config)] if options.config else []), *rest], "longhaul plan memory")
    each = predict_each(config, options.processes)
    parts = max(each, key=total)
    table = Table(box=box.SIMPLE_HEAD, title=_title(options.processes, each.index(parts), len(each)), title_justify="left")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    table.add_column("what")
    for part in parts:
        table.add_row(part.name, f"{part.bytes / GIB:.3f}", part.how)
    table.add_section()
    table.add_row("total", f"{total(parts) / GIB:.3f}", "")
    console = Console()
    console.print(table)
    content: dict[str, Any] = {
        "total_gib": total(parts) / GIB,
        "parts": {part.name: part.bytes / GIB for part in parts},
        "places_gib": [total(parts) / GIB for parts in each],
    }
    if options.measure:
        content["tensors"] = _measured(config, options.processes, each, console)
    if options.json is not None:
        write_file(options.json, json.dumps(content, indent=1).encode() + b"\n", "--json")
    return 0


def _title(processes: int, place: int, places: int) -> str:
    where = f"Process {place} of each pipeline, which holds most, at its peak" if places > 1 else "One process at its peak"
    return f"{where}; {processes} in all"


def _measured(config: TrainConfig, processes: int, each: list[list[Part]], console: Console) -> list[dict[str, float]]:
    """Run the first steps and set what the tensors of every process took beside the prediction, MiB."""
    found = run_on_ranks(measure, processes, 1, config)
    table = Table(box=box.SIMPLE_HEAD, title="Tensors alone, MiB", title_justify="left")
    for name in ("process", "to start", "peak", "predicted", "off by"):
        table.add_column(name, justify="right")
    rows = []
    for rank, result in enumerate(found):
        predicted = total(part for part in each[result["place"]] if part.name != PROCESS)
        off = predicted / result["peak"] - 1
        table.add_row(str(rank), *(f"{value / MIB:.1f}" for value in (result["setup"], result["peak"], predicted)), f"{off:+.1%}")
        rows.append({"setup_mib": result["setup"] / MIB, "peak_mib": result["peak"] / MIB, "predicted_mib": predicted / MIB})
    console.print(table)
    return rows
