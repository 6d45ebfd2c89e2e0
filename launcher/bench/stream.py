"""`longhaul bench stream`: one training step on streams longer than memory.

First a step that still fits is run whole and in chunks, in turns, each way in a process of its own: gradients are compared,
and the speed. Then the step of each length, in chunks, in a process of its own, so that its peak memory is its own. Every process
makes a first, unmeasured step of two chunks, which fills whatever is filled once. The shortest length is run again at the end, so
that a machine that grew slower or faster meanwhile is seen.

Letters: `C` tokens of a chunk.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from longhaul.launcher.metrics.hardware import versions
from longhaul.launcher.parsing import from_file
from longhaul.models.borders import KEEP
from longhaul.models.config import LINEAR_MIXERS, ModelConfig
from longhaul.models.errors import UserError
from longhaul.models.lm import LanguageModel
from longhaul.models.ops.recompute import MODES
from longhaul.models.streaming import check_streamable

from .child import Child
from .stream_step import Way

LENGTHS = (1 << 16, 1 << 18, 1 << 20)
SMALL = {"layers": 4, "width": 256, "heads": 4, "vocab": 512}
# What is aimed at: memory of the longest stream over the shortest's; tokens/s of the slowest over the fastest length's;
# speed of a streamed step over that of the same step whole.
MEMORY, FLAT, SPEED = 1.10, 0.90, 0.70

Answer = dict[str, Any]


class Bench:
    """Starts processes and asks them for steps.

    Args:
        way: of a streamed step.
        config: of the model.
        threads: of each process.
        folder: for scratch files.
        console: for progress.
    """

    def __init__(self, way: Way, config: ModelConfig, threads: int, folder: Path, console: Console) -> None:
        self.way, self.config, self.threads, self.folder, self.console = way, config, threads, folder, console
        self.facts: Answer = {}
        self._started = 0

    def child(self, chunk: int) -> Child:
        """A process that is ready to run streams in chunks, or whole if `chunk` is 0."""
        self._started += 1
        way = dataclasses.replace(self.way, chunk=chunk)
        spec = {"way": dataclasses.asdict(way), "config": dataclasses.asdict(self.config)}
        name = f"steps in chunks of {chunk}" if chunk else "whole steps"
        return Child(name, "longhaul.launcher.bench.stream_step", spec, self.threads, self.folder / f"{self._started}.log")

    def warm(self, child: Child) -> None:
        """Wait until it is there, and for its unmeasured step."""
        self.facts = child.ask()
        self.step(child, 2 * self.way.chunk, "warming up", quiet=True)

    def step(self, child: Child, length: int, title: str, quiet: bool = False) -> Answer:
        """A step of `length` tokens, saying how far it is: all the time on a terminal, else at each tenth."""
        chunks, shown, start = -(-length // self.way.chunk), 0, time.perf_counter()
        answer = child.ask(f"step {length}")
        while "forwards" in answer:
            forwards, replays = answer["forwards"], answer["replays"]
            done = f"{title}: first pass {forwards}, replay {replays} of {chunks} chunks"
            line = f"{done}, {time.perf_counter() - start:.0f} s, {answer['resident_gib']:.2f} GiB resident"
            if self.console.is_terminal:
                self.console.print(line, end="\r", highlight=False, soft_wrap=True)
            elif not quiet and 10 * (forwards + replays) // (2 * chunks) > shown:
                shown = 10 * (forwards + replays) // (2 * chunks)
                self.console.print(line, highlight=False, soft_wrap=True)
            answer = child.ask()
        if self.console.is_terminal:
            self.console.print(" " * self.console.width, end="\r")
        return answer

    def pairs(self, length: int, count: int) -> Answer:
        """The step in chunks and whole, `count` times in turns; the order flips."""
        with self.child(self.way.chunk) as chunked, self.child(0) as whole:
            children = {"streamed": chunked, "whole": whole}
            steps: dict[str, list[Answer]] = {name: [] for name in children}
            for child in children.values():
                self.warm(child)
            for pair in range(count):
                for name in list(children)[:: 1 if pair % 2 == 0 else -1]:
                    steps[name].append(self.step(children[name], length, f"pair {pair + 1}, {name}", quiet=True))
                a, b = (steps[name][-1]["seconds"] for name in ("streamed", "whole"))
                self._say(f"{length:,} tokens, pair {pair + 1} of {count}: {a:.1f} s in chunks, {b:.1f} s whole, {b / a:.2f}x")
            memory = {name: child.ask("memory") for name, child in children.items()}
            files = {name: self.folder / f"{name}.pt" for name in children}
            for name, child in children.items():
                child.ask(f"gradients {files[name]}")
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(steps["streamed"], steps["whole"])]
        processor = [b["processor"] / a["processor"] for a, b in zip(steps["streamed"], steps["whole"])]
        return {
            "length": length,
            "steps": steps,
            "memory": memory,
            "speed": median(ratios),
            "speeds": ratios,
            "processor_speed": median(processor),
            "gradient_error": difference(files["streamed"], files["whole"]),
        }

    def stream(self, length: int) -> Answer:
        """The step of a length, in a process of its own."""
        try:
            with self.child(self.way.chunk) as child:
                self.warm(child)
                found = self.step(child, length, f"{length:,} tokens")
                row = {"length": length, "chunk": self.way.chunk, **found, **child.ask("memory")}
        except (RuntimeError, BrokenPipeError) as error:
            raise UserError(
                f"The step of {length} tokens in chunks of {self.way.chunk} was not finished: {error}\nIf memory was "
                "short, lower --chunk, or recompute with --checkpointing full."
            ) from None
        self._say(f"{length:,} tokens: {row['tokens_per_second']:,.0f} tokens/s, {row['grown_gib']:.3f} GiB above the start")
        return row

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)


def difference(first: Path, second: Path) -> float:
    """RMS of the difference of two files of gradients over RMS of the second, the worst tensor's."""
    one, two = (torch.load(path, weights_only=True) for path in (first, second))
    return max(float((one[name] - other).square().mean().sqrt() / other.square().mean().sqrt()) for name, other in two.items())


def verdicts(results: list[Answer], pairs: Answer | None) -> Answer:
    """Each aim with what was measured: (what, found, aim, reached); found is None where it was not measured."""
    memory = flat = None
    lengths = sorted({row["length"] for row in results})
    if len(lengths) > 1:
        grown = {length: mean(row["grown_gib"] for row in results if row["length"] == length) for length in lengths}
        memory = grown[lengths[-1]] / grown[lengths[0]]
        speeds = [mean(row["tokens_per_second"] for row in results if row["length"] == length) for length in lengths]
        flat = min(speeds) / max(speeds)
    speed = None if pairs is None else pairs["speed"]
    return {
        "peak memory, longest over shortest": (memory, f"at most {MEMORY:.2f}", memory is not None and memory <= MEMORY),
        "tokens/s, slowest over fastest length": (flat, f"at least {FLAT:.2f}", flat is not None and flat >= FLAT),
        "speed, streamed over whole": (speed, f"at least {SPEED:.2f}", speed is not None and speed >= SPEED),
    }


def show(report: Answer, console: Console) -> None:
    """A row a step, and a row an aim."""
    table = Table("tokens", "way", "seconds", "tokens/s", "peak above start, GiB", "peak, GiB", "kept at borders, M")
    pairs = report["pairs"]
    for name in () if pairs is None else ("streamed", "whole"):
        seconds, memory = median(step["seconds"] for step in pairs["steps"][name]), pairs["memory"][name]
        way = "whole" if name == "whole" else f"chunks of {report['chunk']:,}"
        _row(table, pairs["length"], way, seconds, memory, pairs["steps"][name][0]["border_elements"])
    for row in report["results"]:
        _row(table, row["length"], f"chunks of {row['chunk']:,}", row["seconds"], row, row["border_elements"])
    console.print(f"{report['device']}, {report['parameters']:,} parameters", highlight=False, soft_wrap=True)
    console.print(table)
    if pairs is not None:
        console.print(
            f"gradients of the two ways at {pairs['length']:,} tokens differ by {pairs['gradient_error']:.1e}; "
            f"speed by processor time {pairs['processor_speed']:.2f}x",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    aims = Table("", "measured", "aim", "")
    for what, (found, aim, reached) in report["verdicts"].items():
        aims.add_row(
            what, "" if found is None else f"{found:.3f}", aim, "not measured" if found is None else "ok" if reached else "MISSED"
        )
    console.print(aims)


def _row(table: Table, length: int, way: str, seconds: float, memory: Answer, elements: int) -> None:
    numbers = f"{seconds:.1f}", f"{length / seconds:,.0f}", f"{memory['grown_gib']:.3f}", f"{memory['peak_gib']:.3f}"
    table.add_row(f"{length:,}", way, *numbers, f"{elements / 1e6:.2f}")


def model_config(options: argparse.Namespace) -> ModelConfig:
    """Of a file, or of the small model that the options describe."""
    given = {name: value for name in ("mixer", *SMALL) if (value := getattr(options, name)) is not None}
    if options.config is not None:
        config = from_file(options.config).model
        for name in given.keys() - {"layers"}:
            raise UserError(
                f"--{name} {given[name]} is of the small model, but --config {options.config} names another: leave it out."
            )
        return dataclasses.replace(config, num_layers=given.get("layers", config.num_layers))
    sizes = {**SMALL, **given}
    return ModelConfig(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["width"],
        num_layers=sizes["layers"],
        num_heads=sizes["heads"],
        pattern="L",
        linear_mixer=given.get("mixer", "linear_attention"),
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Options, with what depends on the device filled in; UserError if they make no sense."""
    parser = argparse.ArgumentParser(prog="longhaul bench stream", description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of a stream (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=4096, help="tokens of a chunk (default: %(default)s)")
    parser.add_argument("--unstreamed", type=int, default=1 << 15, help="tokens of the step that is also run whole; 0: none "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--pairs", type=int, default=3, help="how often it is (default: %(default)s)")
    parser.add_argument("--keep", choices=KEEP, help="where border states wait (default: disk on a CPU, cpu on a GPU)")
    parser.add_argument("--config", type=Path, help="take the model of a run's file, such as configs/linear_llama3_1b.yaml")
    parser.add_argument("--layers", type=int, help=f"of the model (default: of the file, or {SMALL['layers']})")
    parser.add_argument("--mixer", choices=LINEAR_MIXERS, help="of the small model (default: linear_attention)")
    for name in ("width", "heads", "vocab"):
        parser.add_argument(f"--{name}", type=int, help=f"of the small model (default: {SMALL[name]})")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(default: %(default)s)")
    parser.add_argument("--checkpointing", choices=MODES, default="none", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of each process (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the results to this file, after each of them")
    options = parser.parse_args(argv)
    least = {"chunk": 1, "threads": 1, "pairs": 1, "unstreamed": 0}
    for name, smallest in least.items():
        if getattr(options, name) < smallest:
            raise UserError(f"--{name} is {getattr(options, name)}: give at least {smallest}.")
    if min(options.lengths) < 1:
        raise UserError(f"--lengths holds {min(options.lengths)}: give at least 1.")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device is {options.device}, but there is no GPU here: use cpu.")
    options.keep = options.keep or ("disk" if options.device == "cpu" else "cpu")
    return options


def main(argv: Sequence[str]) -> int:
    """`longhaul bench stream`."""
    options, console = parse(argv), Console()
    config = model_config(options)
    with torch.device("meta"):
        check_streamable(LanguageModel(config))
    names = ("chunk", "keep", "device", "precision", "checkpointing")
    way = Way(**{name: getattr(options, name) for name in names})
    lengths = sorted(set(options.lengths))
    report: Answer = {**dataclasses.asdict(way), "threads": options.threads, "model": dataclasses.asdict(config)}
    report.update(pairs=None, results=[], versions=versions())
    with tempfile.TemporaryDirectory(prefix="longhaul-bench-") as folder:
        bench = Bench(way, config, options.threads, Path(folder), console)
        for length in (0, *lengths, *(lengths[:1] if len(lengths) > 1 else ())):
            if length:
                report["results"].append(bench.stream(length))
            elif options.unstreamed:
                report["pairs"] = _pairs(bench, options.unstreamed, options.pairs, console)
            report.update(**bench.facts, verdicts=verdicts(report["results"], report["pairs"]))
            if options.json is not None:
                options.json.write_text(json.dumps(report, indent=1) + "\n")
    show(report, console)
    return 0


def _pairs(bench: Bench, length: int, count: int, console: Console) -> Answer | None:
    """The paired steps; None, and why, if a process ended: the whole step may be too large for the machine."""
    try:
        return bench.pairs(length, count)
    except (RuntimeError, BrokenPipeError) as error:
        console.print(f"[red]{length:,} tokens whole and in chunks:[/] {error}\nIf memory was short, lower --unstreamed.")
        return None
