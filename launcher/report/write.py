"""Writes report.html and report.json into a run's folder."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longhaul.launcher.metrics.files import replace_file
from longhaul.models.errors import UserError

from .collect import collect
from .page import render
from .plot import draw


def write_report(folder: Path) -> Path:
    """Make the report of the run in `folder`, finished or not, from its files alone.

    Returns:
        The path of report.html.

    Raises:
        UserError: there are no metrics, or nothing can be written.
    """
    folder = Path(folder)
    report = collect(folder)
    page = render(report, draw(report))
    data = json.dumps(_finite(report), indent=1, allow_nan=False, default=str)
    try:
        replace_file(folder / "report.json", data.encode() + b"\n")
        replace_file(folder / "report.html", page.encode())
    except OSError as error:
        raise UserError(f"Cannot write the report to {folder} ({error.strerror}): make room or mend its permissions.") from error
    return folder / "report.html"


def _finite(value: Any) -> Any:
    """JSON has no NaN: the losses of a diverged run become null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(argv: Sequence[str]) -> int:
    """`longhaul report FOLDER`."""
    parser = argparse.ArgumentParser(prog="longhaul report", description="Rebuild the report of a run from its files.")
    parser.add_argument("folder", type=Path, help="the run's folder, the one that holds metrics.jsonl")
    print(f"report: {write_report(parser.parse_args(argv).folder)}")
    return 0
