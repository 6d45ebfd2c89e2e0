"""`longhaul bench step`: the training step of our model beside Hugging Face's, on the same weights.

Each side runs in a process of its own, and they take turns, in an order that flips with every repeat, so that whatever
else the machine does hits both alike. Equal losses and gradients are part of the result.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from longhaul.launcher.metrics.hardware import device_name, versions
from longhaul.models.errors import UserError

from .child import Child
from .sides import MODELS, Shape

# fp32 over thousands of tokens: RMS of the difference over RMS of the reference, per tensor; absolute below the floor.
TOLERANCE, FLOOR = 1e-4, 1e-6
_ROWS = {
    "step, s": "{seconds:.2f}",
    "forward, s": "{forward:.2f}",
    "backward, s": "{backward:.2f}",
    "processor time of all threads, s": "{processor:.2f}",
    "tokens/s": "{rate:,.0f}",
    "peak memory, GiB": "{peak_gib:.2f}",
    "  before the first step, GiB": "{idle_gib:.2f}",
    "loss": "{loss:.6f}",
}
_NAMES = {"ours": "Longhaul", "hf": "Hugging Face"}


class Worker(Child):
    """A side in its own process, asked line by line."""

    def __init__(self, side: str, shape: Shape, threads: int, folder: Path) -> None:
        spec = {"side": side, "shape": dataclasses.asdict(shape), "folder": str(folder)}
        super().__init__(_NAMES[side], "longhaul.launcher.bench.worker", spec, threads, folder / f"{side}.log")
        self.side = side


def compare(shape: Shape, peer: str | None, repeats: int, threads: int) -> dict[str, Any]:
    """Measure and check; see the module."""
    with tempfile.TemporaryDirectory(prefix="longhaul-bench-") as name:
        folder = Path(name)
        result: dict[str, Any] = {
            "shape": dataclasses.asdict(shape),
            "threads": threads,
            "repeats": repeats,
            "device": device_name(torch.device("cpu")),
            "versions": versions(),
        }
        if peer is None:
            with Worker("ours", shape, threads, folder) as ours:
                ours.ask()
                result["sides"] = _measure([ours], shape, repeats)
            return result
        with Worker(peer, shape, threads, folder) as theirs:
            theirs.ask()  # its weights are there from now on
            with Worker("ours", shape, threads, folder) as ours:
                result["parameters"] = ours.ask()["parameters"]
                result["sides"] = _measure([ours, theirs], shape, repeats)
                gradients = [
                    torch.load(worker.ask("gradients")["path"], mmap=True, weights_only=True) for worker in (ours, theirs)
                ]
                result.update(_ratios(result["sides"]["ours"], result["sides"][peer]), **_check(*gradients))
    return result


def _measure(workers: Sequence[Worker], shape: Shape, repeats: int) -> dict[str, Any]:
    """Steps in turns after one unmeasured step each, then peak memory."""
    sides: dict[str, Any] = {worker.side: {"steps": []} for worker in workers}
    for worker in workers:
        worker.ask("step")
    for repeat in range(repeats):
        for worker in workers if repeat % 2 == 0 else workers[::-1]:
            sides[worker.side]["steps"].append(worker.ask("step"))
    for worker in workers:
        side = sides[worker.side]
        side.update(worker.ask("memory"))
        for key in ("seconds", "forward", "processor"):
            side[key] = median(step[key] for step in side["steps"])
        side["rate"] = shape.length / side["seconds"]
        side["loss"] = side["steps"][-1]["loss"]
    return sides


def _ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    pairs = [b["seconds"] / a["seconds"] for a, b in zip(ours["steps"], theirs["steps"], strict=True)]
    return {
        "speedup": median(pairs),
        "speedup_range": [min(pairs), max(pairs)],
        "processor_ratio": theirs["processor"] / ours["processor"],
        "memory_ratio": ours["peak_gib"] / theirs["peak_gib"],
        "loss_difference": abs(ours["loss"] - theirs["loss"]) / abs(theirs["loss"]),
    }


def _check(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The gradient that differs most; names must be the same."""
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"parameters differ: {sorted(ours.keys() ^ theirs.keys())}")
    errors = {name: relative_error(ours[name], theirs[name]) for name in ours}
    worst = max(errors, key=lambda name: errors[name])
    return {"worst_gradient": worst, "gradient_error": errors[worst], "gradients_compared": len(errors)}


def relative_error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """RMS of the difference over RMS of the reference; infinite if anything is not finite."""
    difference = (actual.double() - reference.double()).square().mean().sqrt().item()
    error = difference / max(reference.double().square().mean().sqrt().item(), FLOOR)
    return error if error == error else float("inf")


def show(result: dict[str, Any], console: Console) -> None:
    """Print the result as a table."""
    shape, sides = result["shape"], result["sides"]
    console.print(
        f"training step (forward + backward): {shape['model']}, {shape['layers']} layers of {shape['hidden_size']}, "
        f"{shape['length']:,} tokens, fp32, {result['threads']} threads, median of {result['repeats']}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    table = Table()
    table.add_column("")
    for name in sides:
        table.add_column(_NAMES[name], justify="right")
    for name, text in _ROWS.items():
        table.add_row(name, *(text.format(**side, backward=side["seconds"] - side["forward"]) for side in sides.values()))
    console.print(table)
    if "speedup" not in result:
        return
    low, high = result["speedup_range"]
    console.print(
        f"speed {result['speedup']:.2f}x (median of {result['repeats']} pairs, {low:.2f} to {high:.2f}), "
        f"{result['processor_ratio']:.2f}x in processor time; "
        f"memory {result['memory_ratio']:.2f}x; loss differs by {result['loss_difference']:.1e}, relative; "
        f"{result['gradients_compared']} gradients, the worst ({result['worst_gradient']}) differs by "
        f"{result['gradient_error']:.1e} of its RMS",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """`longhaul bench step`."""
    default = Shape()
    parser = argparse.ArgumentParser(prog="longhaul bench step", description="Time a training step on the CPU.")
    parser.add_argument("--model", choices=MODELS, default=default.model, help="(default: %(default)s)")
    parser.add_argument("--peer", choices=("hf",), help="also run and compare Hugging Face's model on the same weights")
    parser.add_argument("--length", type=int, default=default.length, help="tokens (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=default.layers, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="measured steps a side (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of each side (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args(argv)
    for name, least in (("length", 2), ("layers", 1), ("repeats", 1), ("threads", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} is {getattr(options, name)}: give at least {least}.")
    shape = Shape(model=options.model, length=options.length, layers=options.layers)
    result = compare(shape, options.peer, options.repeats, options.threads)
    show(result, Console())
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.peer is None or max(result["loss_difference"], result["gradient_error"]) <= TOLERANCE:
        return 0
    print(f"error: the two sides do not compute the same; the tolerance is {TOLERANCE:.0e}", file=sys.stderr)
    return 1
