"""Every mixer beside softmax attention: what `bench mixers` and `bench generation` share.

Softmax attention stays in a process of its own from first to last; each mixer comes in one of its own and the two take
turns, in an order that flips with every repeat, so that whatever else the machine does hits both alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from longhaul.launcher.metrics.hardware import device_name, versions
from longhaul.models.errors import UserError
from longhaul.models.mixers.registry import MIXERS

from .child import Child
from .layer import SOFTMAX, LayerShape

Answer = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser, repeats: int) -> None:
    """The options of both benchmarks."""
    parser.add_argument("--mixers", nargs="+", metavar="NAME", help="which mixers (default: all)")
    parser.add_argument("--width", type=int, default=512, help="of a layer, in heads of 64 (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=repeats, help="pairs of measurements (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of each process (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="keep results in this file; a run cut short goes on from it")


def chosen(options: argparse.Namespace, least: dict[str, int]) -> list[str]:
    """The mixers to measure, softmax attention first.

    Raises:
        UserError: an unknown mixer, or a number below `least`.
    """
    for name, smallest in {"width": 64, "repeats": 1, "threads": 1, **least}.items():
        if getattr(options, name) < smallest:
            raise UserError(f"--{name} is {getattr(options, name)}: give at least {smallest}.")
    if options.width % 64:
        raise UserError(f"--width {options.width} is no multiple of 64, the width of a head.")
    for name in options.mixers or ():
        if name not in MIXERS:
            raise UserError(f"There is no mixer {name!r}: the mixers are {', '.join(MIXERS)}.")
    names = options.mixers or MIXERS
    return [SOFTMAX, *(name for name in names if name != SOFTMAX)]


class Record:
    """Results so far, by mixer; written to a file after each, so that a run cut short goes on.

    Args:
        settings: how they were measured; results made with others are refused.
    """

    def __init__(self, file: Path | None, settings: dict[str, Any]) -> None:
        self.file, self.settings = file, settings
        self.mixers: dict[str, Answer] = {}
        if file is None or not file.exists():
            return
        try:
            before = json.loads(file.read_text())
            found, self.mixers = before["settings"], before["mixers"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file} holds no results of this benchmark: give --json another file.") from None
        if found != settings:
            raise UserError(f"{file} holds results for {found}, not {settings}: give --json another file.")

    def add(self, mixer: str, answer: Answer) -> None:
        self.mixers[mixer] = answer
        if self.file is not None:
            facts = {"device": device_name(torch.device("cpu")), "versions": versions()}
            scratch = self.file.with_name(self.file.name + ".part")
            scratch.write_text(json.dumps({"settings": self.settings, "mixers": self.mixers, **facts}, indent=1) + "\n")
            scratch.replace(self.file)


def layer_process(shape: LayerShape, threads: int, folder: Path) -> Child:
    """A process that holds one layer and says, as its first answer, how large it is."""
    spec = {"shape": dataclasses.asdict(shape)}
    return Child(shape.mixer, "longhaul.launcher.bench.layer", spec, threads, folder / f"{shape.mixer}.log")


def in_turns(children: Sequence[Child], command: str, repeats: int) -> list[list[Answer]]:
    """What each child answers, `repeats` times."""
    answers: list[list[Answer]] = [[] for _ in children]
    order = list(range(len(children)))
    for repeat in range(repeats):
        for index in order if repeat % 2 == 0 else order[::-1]:
            answers[index].append(children[index].ask(command))
    return answers


def ratio(ours: Sequence[Answer], softmax: Sequence[Answer], key: str = "seconds") -> float:
    """How many times less `key` a mixer needs than softmax attention: the median over pairs."""
    return median(b[key] / a[key] for a, b in zip(ours, softmax, strict=True))


def measure_all(
    names: Sequence[str],
    record: Record,
    softmax: Callable[[], Child],
    one: Callable[[str, Child], Answer],
    line: Callable[[Answer], str],
    console: Console,
) -> None:
    """Measure what the record lacks, and say so mixer by mixer."""
    missing = [name for name in names if name not in record.mixers]
    if not missing:
        return
    with softmax() as reference:
        for name in missing:
            record.add(name, one(name, reference))
            done = len(names) - len(missing) + missing.index(name) + 1
            console.print(f"{done:2}/{len(names)} {name:18} {line(record.mixers[name])}", highlight=False, soft_wrap=True)
