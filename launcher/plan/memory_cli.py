"""The command `longhaul plan memory`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from longhaul.launcher.parsing import parse
from longhaul.models.errors import UserError

from .memory import GIB, predict
from .picture import write_file


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
    parser.add_argument("--json", type=Path, help="also write the prediction to this file")
    options, rest = parser.parse_known_args(list(argv))
    if options.processes < 1:
        raise UserError(f"--processes is {options.processes}: give at least 1.")
    config = parse([*(["--config", str(options.config)] if options.config else []), *rest], "longhaul plan memory")
    parts = predict(config, options.processes)
    total = sum(part.bytes for part in parts)
    table = Table(box=box.SIMPLE_HEAD, title=f"One of {options.processes} processes, at its peak", title_justify="left")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    table.add_column("what")
    for part in parts:
        table.add_row(part.name, f"{part.bytes / GIB:.3f}", part.how)
    table.add_section()
    table.add_row("total", f"{total / GIB:.3f}", "")
    Console().print(table)
    if options.json is not None:
        content = {"total_gib": total / GIB, "parts": {part.name: part.bytes / GIB for part in parts}}
        write_file(options.json, json.dumps(content, indent=1).encode() + b"\n", "--json")
    return 0
