"""`longhaul bench rsa`: Ring Self-Attention against tensor parallelism, as in its paper (arXiv 2105.13120, section 4).

One training step of an encoder (masked-LM, AdamW) on processes of this machine. For each number of processes and each way to
divide the step: the longest documents, at a given number of them, and the most documents, at a given length, with which no rank
ever holds more than a budget: parameters, gradients, moments and every activation, as recorded. By default BERT-Base with
every size scaled down (`SCALED`), in the budget that 16 GiB are for BERT-Base.

The paper's tensor parallelism keeps activations between layers whole on every rank (`megatron`); Longhaul's own divides them
(`tensor`). Both keep the scores of attention, as RSA does, and as was usual before fused kernels.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from longhaul.launcher.metrics.hardware import versions
from longhaul.models.encoder import Encoder
from longhaul.models.errors import UserError

from .ranks import run_on_ranks
from .rsa_ranks import SIDES, Axis, Shape, Task, search

BERT_BASE = Shape(layers=12, width=768, heads=12, inner=2048, vocabulary=30522, projected=256)
GPU = 16 << 30  # bytes of one of the paper's GPUs
# Layers and heads 1/3, width 1/16, so head width and length 3/16: scores stay the same share of a token's activations.
# The vocabulary 1/48: embedding and logits stay the same share. In as many bytes a parameter fit 1/3 of the documents.
SCALED = Shape(layers=4, width=48, heads=4, inner=128, vocabulary=636, projected=48)
LENGTH, DOCUMENTS = 96, (21, 1)  # for the paper's 512, and its batches of 64 and, with Linformer, 4


class Published(NamedTuple):
    """Largest of sequence parallelism over the largest of tensor parallelism, on this many GPUs, BERT-Base."""

    ratio: float
    ranks: int
    opponents: int


PUBLISHED = {"length": Published(3.0, 64, 12), "batch": Published(13.7, 64, 12)}


class Ratio(NamedTuple):
    """Largest against largest: `absolute` is `ranks` (how many times more of them) times `per_rank`."""

    absolute: float
    ranks: float

    @property
    def per_rank(self) -> float:
        return self.absolute / self.ranks

    @classmethod
    def of(cls, size: int, ranks: int, other: int, other_ranks: int) -> Ratio:
        return cls(size / other, ranks / other_ranks)


def best(rows: Sequence[Mapping[str, Any]], side: str, axis: Axis) -> Mapping[str, Any]:
    """The row of the largest size; of equal ones that of the fewest ranks."""
    own = [row for row in rows if row["side"] == side and (row["axis"], row["held"]) == axis]
    return max(own, key=lambda row: (row["largest"], -row["ranks"]))


def compare(rows: Sequence[Mapping[str, Any]], side: str, other: str, axis: Axis) -> tuple[Ratio, Ratio | None]:
    """A side's largest size over another's: each on the ranks where it gets farthest, and both on the latter's."""
    mine, theirs = best(rows, side, axis), best(rows, other, axis)
    same = [row for row in rows if row["side"] == side and (row["axis"], row["held"]) == axis and row["ranks"] == theirs["ranks"]]
    overall = Ratio.of(mine["largest"], mine["ranks"], theirs["largest"], theirs["ranks"])
    equal = [Ratio.of(row["largest"], row["ranks"], theirs["largest"], theirs["ranks"]) for row in same]
    return overall, equal[0] if equal else None


def parameters(shape: Shape) -> int:
    """Of the encoder with softmax attention."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Encoder(shape.config("attention", 1)).parameters())


def run(options: argparse.Namespace, shape: Shape, budget: int, axes: Sequence[Axis]) -> list[dict[str, Any]]:
    """Every search; one start of processes for each number of them."""
    rows: list[dict[str, Any]] = []
    for ranks in sorted({*options.sequence_ranks, *options.tensor_ranks}):
        tasks = []
        for name in options.sides:
            if ranks in (options.tensor_ranks if SIDES[name].tensor else options.sequence_ranks):
                tasks += [Task(name, axis, _start(rows, name, axis, ranks)) for axis in axes]
        found = run_on_ranks(search, ranks, 1, shape, tasks, budget)[0] if tasks else {}
        for index, task in enumerate(tasks):
            answer = found[str(index)]
            size = answer["size"]
            row = {"side": task.side, "ranks": ranks, "axis": task.axis.name, "held": task.axis.held, "largest": size}
            peaks = {"peak_bytes": answer["peaks"].get(size), "next_bytes": answer["peaks"][size + 1]}
            rows.append(row | peaks | {"measured": len(answer["peaks"])})
    return rows


def _start(rows: Sequence[Mapping[str, Any]], side: str, axis: Axis, ranks: int) -> int:
    """Where to search: the largest sizes on fewer ranks, carried on as a power of the ranks; 0 if there is none."""
    before = [row for row in rows if row["side"] == side and (row["axis"], row["held"]) == axis and row["largest"]]
    if not before:
        return 0
    last, power = before[-1], 0.6
    if len(before) > 1:
        power = math.log(last["largest"] / before[-2]["largest"]) / math.log(last["ranks"] / before[-2]["ranks"])
    return max(1, round(last["largest"] * (ranks / last["ranks"]) ** power))


def show(rows: Sequence[Mapping[str, Any]], axes: Sequence[Axis], console: Console) -> None:
    """A table for each axis, then the ratios, and the published ones."""
    sides = list(dict.fromkeys(row["side"] for row in rows))
    opponents = [name for name in sides if SIDES[name].tensor]
    for axis in axes:
        ratios = [f"RSA / {SIDES[name].title}" for name in opponents] if "rsa" in sides else []
        table = Table("ranks", *(SIDES[name].title for name in sides), *ratios, title=f"{_what(axis)} (per rank)")
        for ranks in sorted({row["ranks"] for row in rows}):
            found = {row["side"]: row["largest"] for row in rows if row["ranks"] == ranks and (row["axis"], row["held"]) == axis}
            cells = [f"{found[name]:,} ({found[name] / ranks:,.1f})" if name in found else "" for name in sides]
            pairs = [(found.get("rsa"), found.get(name)) for name in opponents] if ratios else []
            table.add_row(str(ranks), *cells, *(f"{mine / other:.2f}" if mine and other else "" for mine, other in pairs))
        console.print(table)
        for name in opponents:
            for side in (name for name in sides if not SIDES[name].tensor):
                console.print(_line(rows, side, name, axis), highlight=False, soft_wrap=True)
    for name, published in PUBLISHED.items():
        ratio = Ratio(published.ratio, published.ranks / published.opponents)
        text = f"published, {name}: RSA on {published.ranks} GPUs / TP on {published.opponents}: {_parts(ratio, 'GPU')}"
        console.print(text, highlight=False, soft_wrap=True)


def _what(axis: Axis) -> str:
    return f"longest documents, {axis.held} of them" if axis.name == "length" else f"most documents of {axis.held} tokens"


def _line(rows: Sequence[Mapping[str, Any]], side: str, other: str, axis: Axis) -> str:
    mine, theirs = best(rows, side, axis), best(rows, other, axis)
    if not theirs["largest"]:
        return f"{_what(axis)}: nothing fits with {SIDES[other].title}"
    overall, equal = compare(rows, side, other, axis)
    text = f"{_what(axis)}: {SIDES[side].title} on {mine['ranks']} ranks / {SIDES[other].title} on {theirs['ranks']}: "
    text += _parts(overall, "rank")
    return text if equal is None else f"{text}; on {theirs['ranks']} ranks each {equal.absolute:.2f}x"


def _parts(ratio: Ratio, what: str) -> str:
    return f"{ratio.absolute:.2f}x = {ratio.ranks:.2f}x as many {what}s, {ratio.per_rank:.2f}x a {what}"


def main(argv: Sequence[str]) -> int:
    """`longhaul bench rsa`."""
    options = _arguments(argv)
    shape = Shape(**{name: getattr(options, name) for name in Shape._fields})
    shape.config("attention", 1)  # refuses what does not divide
    if shape.width // shape.heads % 2:
        raise UserError(
            f"--width {shape.width} / --heads {shape.heads} is odd, and rotary positions turn pairs: give heads of even width."
        )
    for ranks in options.tensor_ranks:
        if shape.heads % ranks:
            raise UserError(f"--tensor-ranks {ranks} does not divide --heads {shape.heads}: give a number that does.")
    count = parameters(shape)
    budget = round(options.budget * 2**20) if options.budget else round(GPU * count / parameters(BERT_BASE))
    axes = [*(Axis("length", documents) for documents in options.documents), Axis("batch", options.length)]
    console = Console()
    console.print(f"{shape}, {count:,} parameters; budget {budget / 2**20:.2f} MiB a rank", highlight=False, soft_wrap=True)
    rows = run(options, shape, budget, axes)
    show(rows, axes, console)
    if options.json is not None:
        found = {"versions": versions(), "shape": shape._asdict(), "parameters": count, "budget_bytes": budget, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="longhaul bench rsa", description=__doc__.splitlines()[0])
    ways = [name for name in SIDES if name != "ring"]
    for name in Shape._fields:
        help_text = f"for BERT-Base's {getattr(BERT_BASE, name)} (default: %(default)s)"
        parser.add_argument(f"--{name}", type=int, default=getattr(SCALED, name), help=help_text)
    many: dict[str, Any] = {"type": int, "nargs": "+"}
    parser.add_argument("--length", type=int, default=LENGTH, help="where documents are counted (default: %(default)s)")
    parser.add_argument("--documents", **many, default=DOCUMENTS, help="where lengths are sought (default: %(default)s)")
    parser.add_argument("--sequence-ranks", **many, default=(1, 2, 4, 8), help="(default: %(default)s)")
    parser.add_argument("--tensor-ranks", **many, default=(1, 2, 4), help="divisors of the heads (default: %(default)s)")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=ways, help="(default: %(default)s)")
    parser.add_argument("--budget", type=float, help="MiB a rank may hold (default: as 16 GiB for BERT-Base)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args(argv)
    positive = {name: getattr(options, name) for name in Shape._fields}
    lists = ("documents", "sequence_ranks", "tensor_ranks")
    positive |= {"length": options.length, **{name: min(getattr(options, name)) for name in lists}}
    for name, value in positive.items():
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}: give at least 1.")
    if options.budget is not None and options.budget <= 0:
        raise UserError(f"--budget is {options.budget:g}: give more than 0 MiB.")
    return options
