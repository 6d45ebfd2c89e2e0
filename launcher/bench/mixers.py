"""`longhaul bench mixers`: speed and memory of a training step of each mixer beside softmax attention's.

A step is the forward and backward of one layer: the mixer alone, without norm and feed-forward, in float32, with its
default options, on one document. Peak memory is that of a process of its own, above what it held before its first step.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from .beside import Answer, Record, add_arguments, chosen, in_turns, layer_process, measure_all, ratio
from .child import Child
from .layer import SOFTMAX, LayerShape


def measure(shape: LayerShape, softmax: Child, repeats: int, threads: int, folder: Path) -> Answer:
    """One mixer, against a process of softmax attention that has made a step already."""
    if shape.mixer == SOFTMAX:
        steps, memory, size = in_turns([softmax], "step", repeats)[0], softmax.ask("memory"), {}
        faster = 1.0
    else:
        with layer_process(shape, threads, folder) as child:
            size = child.ask()
            child.ask("step")
            steps, theirs = in_turns([child, softmax], "step", repeats)
            memory, faster = child.ask("memory"), ratio(steps, theirs)
    seconds = median(step["seconds"] for step in steps)
    return {
        **size,
        "seconds": seconds,
        "forward": median(step["forward"] for step in steps),
        "tokens_per_second": shape.length / seconds,
        "times_softmax_speed": faster,
        "memory_gib": memory["peak_gib"] - memory["idle_gib"],
        "steps": steps,
    }


def show(record: Record, names: Sequence[str], console: Console) -> None:
    """Print the table, the fastest first."""
    settings, results = record.settings, {name: record.mixers[name] for name in names}
    reference = results[SOFTMAX]
    console.print(
        f"forward and backward of one layer: {settings['length']:,} tokens, width {settings['width']}, float32, "
        f"{settings['threads']} threads, median of {settings['repeats']} pairs",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    table = Table()
    for title in ("mixer", "tokens/s", "x softmax", "step, s", "forward, s", "memory, GiB", "x softmax"):
        first = title == "mixer"
        table.add_column(title, justify="left" if first else "right", no_wrap=first)
    for name, result in sorted(results.items(), key=lambda item: -item[1]["times_softmax_speed"]):
        table.add_row(
            name,
            f"{result['tokens_per_second']:,.0f}",
            f"{result['times_softmax_speed']:.2f}",
            f"{result['seconds']:.2f}",
            f"{result['forward']:.2f}",
            f"{result['memory_gib']:.2f}",
            f"{result['memory_gib'] / max(reference['memory_gib'], 1e-9):.2f}",
        )
    console.print(table)


def main(argv: Sequence[str]) -> int:
    """`longhaul bench mixers`."""
    parser = argparse.ArgumentParser(prog="longhaul bench mixers", description=__doc__.split("\n\n")[0])
    parser.add_argument("--length", type=int, default=8192, help="tokens of the document (default: %(default)s)")
    add_arguments(parser, repeats=3)
    options = parser.parse_args(argv)
    names, console = chosen(options, {"length": 1}), Console()
    settings = {name: getattr(options, name) for name in ("length", "width", "repeats", "threads")}
    record = Record(options.json, settings)
    with tempfile.TemporaryDirectory(prefix="longhaul-bench-") as scratch:
        folder = Path(scratch)

        def shape(name: str) -> LayerShape:
            return LayerShape(mixer=name, width=options.width, length=options.length)

        def softmax() -> Child:
            child = layer_process(shape(SOFTMAX), options.threads, folder)
            child.ask()
            child.ask("step")
            return child

        measure_all(
            names,
            record,
            softmax,
            lambda name, reference: measure(shape(name), reference, options.repeats, options.threads, folder),
            lambda found: f"{found['tokens_per_second']:>9,.0f} tokens/s, {found['times_softmax_speed']:.2f}x softmax's, "
            f"{found['memory_gib']:.2f} GiB",
            console,
        )
    show(record, names, console)
    return 0
