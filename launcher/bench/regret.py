"""`longhaul bench engines --regret`: what choosing automatically costs against the best choice, wire by wire.

The wire is emulated, the layer's kernels are slept for the times they took alone, the exchanges are real. Every repeat
runs all exchanges and `auto` in turn. Regret is the layer's time (forward and backward) with `auto` over that with the best
exchange, less 1, of medians over repeats (at least as many as asked for). The best one is the least of several noisy medians, so
noise counts against `auto`; beside it stands the regret of what it picked, by that exchange's own time.

What was measured is written after each number of ranks and kind of map; a run that finds a file goes on where it ended.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from longhaul.parallel.comm import Wire
from longhaul.parallel.exchange.auto import MEASURED, Auto
from longhaul.parallel.exchange.cost import FLAT
from longhaul.parallel.exchange.registry import make_exchange
from longhaul.parallel.runtime import Runtime

from .engine_ranks import Layer, Phases, clocked, linear_slept, measure_phases
from .ranks import run_on_ranks

Wires = Sequence[tuple[float, float]]  # ms, MB/s
MAPS = ("scalar", "dense")
SHORT = 1.0  # seconds that all repeats of a cell may take, if more than asked for


def measure(runtime: Runtime, layer: Layer, lengths: Sequence[tuple[int, Phases]], wires: Wires, repeats: int) -> dict[str, Any]:
    """On one rank: seconds of every exchange by length and wire, and what `auto` picked, forward and backward."""
    found = {}
    for (tokens, phases), (delay, bandwidth) in itertools.product(lengths, wires):
        comm = runtime.comm()
        comm.wire = Wire(delay * 1e-3, bandwidth * 1e6)
        exchanges = {name: make_exchange(name, comm) for name in (*FLAT, "auto")}
        works = {name: linear_slept(layer, comm, exchange, tokens, phases) for name, exchange in exchanges.items()}
        for name, work in works.items():
            for _ in range(MEASURED + 2 if name == "auto" else 1):
                work()
        times: dict[str, list[float]] = {name: [] for name in works}
        for repeat in range(_count(runtime, sum(clocked(runtime, work) for work in works.values()), repeats)):
            for name in list(works)[:: 1 if repeat % 2 else -1]:
                times[name].append(clocked(runtime, works[name]))
        auto = exchanges["auto"]
        assert isinstance(auto, Auto), auto
        picked = [choice.name for choice in list(auto.choices.values())[-2:]]
        found[f"{tokens} {delay} {bandwidth}"] = {"times": times, "picked": picked, "told": auto.describe()}
    return found


def _count(runtime: Runtime, seconds: float, repeats: int) -> int:
    """Repeats of works that take so long in all: short ones, which noise disturbs more, up to five times as often."""
    microseconds = runtime.maximum(int(1e6 * seconds))
    return min(5 * repeats, max(repeats, int(1e6 * SHORT) // max(1, microseconds)))


def run(
    ranks: Sequence[int],
    tokens_per_rank: Sequence[int],
    wires: Wires,
    layers: Sequence[Layer],
    repeats: int,
    path: Path | None = None,
) -> list[dict[str, Any]]:
    """Every cell of the grid; lengths are tokens of a rank here, so that local work is the same for all P.

    Args:
        path: a JSON file of cells, read first and written as they come.
    """
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path is not None and path.exists() else []
    for layer, P in itertools.product(layers, ranks):
        cells = {
            (tokens, *wire): {
                "maps": MAPS[layer.dense],
                "ranks": P,
                "tokens_per_rank": tokens,
                "delay_ms": wire[0],
                "bandwidth_mb_s": wire[1],
                "heads": layer.heads,
                "width": layer.width,
            }
            for tokens, wire in itertools.product(tokens_per_rank, wires)
        }
        if all(any(cell.items() <= row.items() for row in rows) for cell in cells.values()):
            continue
        phases = {tokens: measure_phases(layer, tokens) for tokens in tokens_per_rank}
        lengths = [(tokens * P, phases[tokens]) for tokens in tokens_per_rank]
        found = run_on_ranks(measure, P, 1, layer, lengths, wires, repeats)
        for (tokens, delay, bandwidth), cell in cells.items():
            results = [result[f"{tokens * P} {delay} {bandwidth}"] for result in found]
            rows.append(cell | {"slept_s": sum(phases[tokens])} | compare(results))
        if path is not None:
            path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    return rows


def compare(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One cell from what its ranks found: times of the slowest rank, and the regret."""
    times = {
        name: median(max(repeat) for repeat in zip(*(result["times"][name] for result in results)))
        for name in results[0]["times"]
    }
    best, picked = min(FLAT, key=lambda name: times[name]), results[0]["picked"]
    return {
        "times_s": times,
        "best": best,
        "picked": picked,
        "told": results[0]["told"],
        "regret": max(0.0, times["auto"] / times[best] - 1),
        "regret_of_pick": times[picked[0]] / times[best] - 1 if picked[0] == picked[1] else None,
    }


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print each cell, and the median and worst regret."""
    columns = (
        "maps",
        "P",
        "tokens a rank",
        "ms",
        "MB/s",
        "slept ms",
        *(f"{name} ms" for name in (*FLAT, "auto")),
        "picked",
        "regret",
    )
    table = Table(*columns, title="one linear layer, forward + backward; emulated wire, kernels slept")
    for row in rows:
        times = [f"{1e3 * row['times_s'][name]:.1f}" for name in (*FLAT, "auto")]
        wire = (f"{row['delay_ms']:g}", f"{row['bandwidth_mb_s']:g}")
        picked = ", ".join(dict.fromkeys(row["picked"]))
        table.add_row(
            row["maps"],
            str(row["ranks"]),
            str(row["tokens_per_rank"]),
            *wire,
            f"{1e3 * row['slept_s']:.1f}",
            *times,
            picked,
            f"{row['regret']:.1%}",
        )
    console.print(table)
    console.print(summary(rows), highlight=False, soft_wrap=True)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The two numbers the bench is for, and what a fixed choice would have cost on the same grid."""
    regrets = [row["regret"] for row in rows]
    lines = [f"auto over the best exchange, {len(rows)} cells: median {median(regrets):.1%}, worst {max(regrets):.1%}"]
    picks = [row["regret_of_pick"] for row in rows if row["regret_of_pick"] is not None]
    if picks:
        lines.append(f"by the time of what it picked, {len(picks)} cells: median {median(picks):.1%}, worst {max(picks):.1%}")
    for name in FLAT:
        fixed = [row["times_s"][name] / row["times_s"][row["best"]] - 1 for row in rows]
        lines.append(f"{name} everywhere: median {median(fixed):.1%}, worst {max(fixed):.1%}")
    return "\n".join(lines)
