"""The command `longhaul plan calibrate`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from longhaul.launcher.metrics.hardware import device_name
from longhaul.launcher.parsing import parse
from longhaul.models.errors import UserError

from . import calibrate
from .picture import write_file

BAR = 0.06  # the published planner's prediction error


def main(argv: Sequence[str], timer: calibrate.Timer | None = None) -> int:
    """Time, fit, write, report. `timer` replaces the clock."""
    parser = argparse.ArgumentParser(
        "longhaul plan calibrate",
        description="Time the model's layers on this machine and fit the planner's constants. Flags of longhaul train "
        "(--model.pattern L) are understood.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, help="a run's configuration (default: the defaults of longhaul train)")
    parser.add_argument("--output", type=Path, default=Path("calibration.json"), help="(default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(calibrate.LENGTHS), help="tokens; fitted")
    parser.add_argument("--held-out", type=int, nargs="+", default=list(calibrate.HELD_OUT), help="tokens; predicted only")
    parser.add_argument("--seconds", type=float, default=40.0, help="longer lengths are left out (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    options, rest = parser.parse_known_args(list(argv))
    if min(*options.lengths, *options.held_out, options.repeats) < 1 or not options.seconds > 0:
        raise UserError("--lengths, --held-out, --repeats and --seconds must be above 0.")
    if set(options.lengths) & set(options.held_out):
        raise UserError("--held-out names a length of --lengths: a length that is fitted cannot judge the fit.")
    if not options.output.parent.is_dir():
        raise UserError(f"--output {options.output} cannot be written: give a path in a folder that exists.")
    config = parse([*(["--config", str(options.config)] if options.config else []), *rest], "longhaul plan calibrate")
    wanted = config.train.device
    device = torch.device("cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()) else "cpu")
    found = calibrate.measure(
        config,
        timer,
        device,
        options.repeats,
        lengths=options.lengths,
        held_out=options.held_out,
        seconds=options.seconds,
    )
    content = calibrate.to_json(found, config, device_name(device))
    write_file(options.output, json.dumps(content, indent=1).encode() + b"\n", "--output")
    _show(found, options.output, Console())
    return 0


def _show(found: calibrate.Calibration, path: Path, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, title="Seconds of one layer, forward and backward", title_justify="left")
    for name in ("layer", "TFLOP/s linear", "TFLOP/s quadratic", "fixed, ms", "longest timed", "error on held-out lengths"):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for name, rate in found.rates.items():
        longest = max(each.tokens for each in found.samples if each.mixer == name)
        speeds = (f"{1e-12 / speed:.4g}" if speed else "-" for speed in (rate.linear, rate.quadratic))
        table.add_row(name, *speeds, f"{1e3 * rate.bias:.3g}", f"{longest:,}", f"{found.errors[name]:.1%}")
    console.print(table)
    error = found.errors["model"]
    said = "within" if error < BAR else "above"
    console.print(
        f"Whole model: {error:.1%} mean error on held-out lengths, {said} the {BAR:.0%} a planner needs. Wrote {path}.",
        highlight=False,
        soft_wrap=True,
    )
    if error >= BAR:
        console.print("Repeat it on an idle machine, with more --repeats or longer --lengths.", soft_wrap=True)
