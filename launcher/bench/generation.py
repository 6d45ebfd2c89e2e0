"""`longhaul bench generation`: what one more token costs after a short and a long context, beside softmax attention.

One layer (the mixer alone, float32, default options) reads a context into its state, piece by piece, and then makes one token
after the other from that state. Softmax attention gets keys and values at random instead: how they came about costs a token
nothing. A recurrent state has the same size after any context; keys and values grow with it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from longhaul.models.errors import UserError

from .beside import Answer, Record, add_arguments, chosen, in_turns, layer_process, measure_all, ratio
from .child import Child
from .layer import SOFTMAX, LayerShape


def measure(
    shape: LayerShape, softmax: Child, contexts: Sequence[int], tokens: int, repeats: int, threads: int, folder: Path
) -> Answer:
    """One mixer after each context, against a process of softmax attention whose keys and values are there."""
    found: Answer = {}
    if shape.mixer == SOFTMAX:
        for context in contexts:
            filled = softmax.ask(f"fill {context}")
            softmax.ask(f"tokens {context} 1")
            made = in_turns([softmax], f"tokens {context} {tokens}", repeats)[0]
            found[str(context)] = _entry(made, made, filled)
        return found
    with layer_process(shape, threads, folder) as child:
        child.ask()
        for context in contexts:
            filled = child.ask(f"fill {context}")
            child.ask(f"tokens {context} 1")
            ours, theirs = in_turns([child, softmax], f"tokens {context} {tokens}", repeats)
            found[str(context)] = _entry(ours, theirs, filled)
    return found


def _entry(ours: Sequence[Answer], theirs: Sequence[Answer], filled: Answer) -> Answer:
    seconds = median(answer["seconds"] for answer in ours)
    return {"seconds": seconds, "times_softmax_speed": ratio(ours, theirs), "state_bytes": filled["state_bytes"]}


def show(record: Record, names: Sequence[str], console: Console) -> None:
    """Print the table, the fastest after the longest context first."""
    settings, contexts = record.settings, [str(context) for context in record.settings["contexts"]]
    console.print(
        f"one token of one layer: width {settings['width']}, float32, {settings['threads']} threads, median of "
        f"{settings['repeats']} pairs of {settings['tokens']} tokens",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    table = Table()
    table.add_column("mixer", no_wrap=True)
    for context in contexts:
        size = f"{int(context):,}"
        for title in (f"ms after {size}", "x softmax", "state, KiB"):
            table.add_column(title, justify="right")
    results = sorted(((name, record.mixers[name]) for name in names), key=lambda item: item[1][contexts[-1]]["seconds"])
    for name, result in results:
        cells = []
        for context in contexts:
            entry = result[context]
            cells += [
                f"{1e3 * entry['seconds']:.2f}",
                f"{entry['times_softmax_speed']:.2f}",
                f"{entry['state_bytes'] / 1024:,.1f}",
            ]
        table.add_row(name, *cells)
    console.print(table)


def main(argv: Sequence[str]) -> int:
    """`longhaul bench generation`."""
    parser = argparse.ArgumentParser(prog="longhaul bench generation", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[1024, 65536], metavar="TOKENS", help="(default: %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=20, help="tokens of a measurement (default: %(default)s)")
    add_arguments(parser, repeats=5)
    options = parser.parse_args(argv)
    names, console = chosen(options, {"tokens": 1}), Console()
    contexts = sorted(set(options.contexts))
    if contexts[0] < 1:
        raise UserError(f"--contexts holds {contexts[0]}: give at least 1 token.")
    settings = {"contexts": contexts} | {name: getattr(options, name) for name in ("tokens", "width", "repeats", "threads")}
    record = Record(options.json, settings)
    with tempfile.TemporaryDirectory(prefix="longhaul-bench-") as scratch:
        folder = Path(scratch)

        def shape(name: str) -> LayerShape:
            return LayerShape(mixer=name, width=options.width, length=1024)

        def softmax() -> Child:
            child = layer_process(shape(SOFTMAX), options.threads, folder)
            child.ask()
            for context in contexts:
                child.ask(f"fill {context}")
                child.ask(f"tokens {context} 1")
            return child

        def one(name: str, reference: Child) -> Answer:
            return measure(shape(name), reference, contexts, options.tokens, options.repeats, options.threads, folder)

        def line(found: Answer) -> str:
            return ", ".join(
                f"after {context:,}: {1e3 * found[str(context)]['seconds']:.2f} ms "
                f"({found[str(context)]['times_softmax_speed']:.1f}x softmax's speed)"
                for context in contexts
            )

        measure_all(names, record, softmax, one, line, console)
    show(record, names, console)
    return 0
