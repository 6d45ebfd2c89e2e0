"""`longhaul bench engines`: time, messages and bytes of every exchange and attention engine, by length and ranks.

One layer, forward and backward, in turns with and without its communication:

    overhead   the same op on one token, no communication: what it costs to call it
    compute    the op on a rank's tokens, no communication, less the overhead
    exposed    the rest: communication that local work does not hide, and the arithmetic that comes with it

Medians of paired differences; the slowest rank sets each time. `--delay` and `--bandwidth` emulate a wire in-process. More ranks
than cores cannot compute side by side: `--compute sleep` sleeps instead, for the times that the kernels took alone at that
length, so only communication is real (linear layers). `--namespaces` gives every rank a network of its own, whose rate the
kernel shapes. `kv_ring` is ring attention on the linear layer (`kv_ring.py`), for comparison. `--regret` compares `auto` with the
best exchange over a grid.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from longhaul.models.errors import UserError
from longhaul.parallel.attention.registry import ENGINES
from longhaul.parallel.exchange.registry import EXCHANGES

from . import namespaces, regret
from .engine_ranks import KV_RING, Cell, Layer, measure, measure_blocks, measure_phases
from .namespaces import run_in_namespaces
from .ranks import run_on_ranks

# Engines of two levels need groups of nodes, which processes of one machine do not have.
LINEAR = (*(name for name in EXCHANGES if name != "hierarchical"), KV_RING)
SOFTMAX = tuple(name for name in ENGINES if name != "usp")


def combine(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One cell from what its ranks found."""
    pairs = [tuple(max(rank[k] for rank in repeat) for k in range(3)) for repeat in zip(*(r["pairs"] for r in results))]
    overhead = median(one for _, _, one in pairs)
    return {
        "total_s": median(full for full, _, _ in pairs),
        "overhead_s": overhead,
        "compute_s": max(0.0, median(alone for _, alone, _ in pairs) - overhead),
        "exposed_s": median(full - alone for full, alone, _ in pairs),
        "messages": max(result["messages"] for result in results),
        "bytes": max(result["bytes"] for result in results),
    }


def make_cells(options: argparse.Namespace, layer: Layer, ranks: int) -> list[Cell]:
    """All cells of one number of ranks; kernels are measured here, while nothing else of ours runs."""
    cells = []
    for tokens in options.lengths:
        slept: list[Any] = [None] * 4
        if options.compute == "sleep":
            sizes = (-(-tokens // ranks), 1)
            slept = [measure_phases(layer, size) for size in sizes]
            slept += [measure_blocks(layer, size) if KV_RING in options.exchanges else None for size in sizes]
        cells += [Cell("linear", name, tokens, *slept)._replace(cut=options.scan_blocks) for name in options.exchanges]
        if options.compute == "real":
            cells += [Cell("softmax", name, tokens) for name in options.attention]
    return cells


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every cell of the table."""
    layer, rows = Layer(options.heads, options.width), []
    wire = None
    if options.delay or options.bandwidth:
        wire = (options.delay * 1e-3, options.bandwidth * 1e6 if options.bandwidth else None)
    torch.set_num_threads(1)
    for ranks in options.ranks:
        cells = make_cells(options, layer, ranks)
        args = (layer, cells, wire, options.repeats)
        if options.namespaces:
            found = run_in_namespaces(measure, ranks, 1, options.rate, *args)
        else:
            found = run_on_ranks(measure, ranks, 1, *args)
        for index, cell in enumerate(cells):
            row = {"layer": cell.kind, "engine": cell.engine, "ranks": ranks, "tokens": cell.tokens}
            rows.append(row | combine([result[str(index)] for result in found]))
    return rows


def show(rows: Sequence[dict[str, Any]], options: argparse.Namespace, console: Console) -> None:
    """Print the table, and how engines that claims are about compare."""
    wire = "processes of this machine"
    if options.delay or options.bandwidth:
        wire = f"emulated wire, {options.delay:g} ms" + (f", {options.bandwidth:g} MB/s" if options.bandwidth else "")
    if options.namespaces:
        wire = f"network namespaces, {options.rate or 'no rate set'}"
    compute = "kernels slept for the time they took alone" if options.compute == "sleep" else "one kernel for all, computed"
    table = Table(
        *("layer", "engine", "P", "tokens", "total ms", "overhead ms", "compute ms", "exposed ms", "messages", "KiB"),
        title=f"{options.heads} heads of {options.width}, fp32, forward + backward; {wire}; {compute}",
    )
    for row in rows:
        times = (f"{1e3 * row[key]:.2f}" for key in ("total_s", "overhead_s", "compute_s", "exposed_s"))
        cells = (row["layer"], row["engine"], str(row["ranks"]), f"{row['tokens']:,}", *times)
        table.add_row(*cells, str(row["messages"]), f"{row['bytes'] / 1024:,.0f}")
    console.print(table)
    for line in claims(rows):
        console.print(line, highlight=False, soft_wrap=True)


def claims(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Ratios of total time behind published claims, for every length and number of ranks measured."""
    found: dict[tuple[str, str], dict[tuple[int, int], float]] = {}
    for row in rows:
        found.setdefault((row["layer"], row["engine"]), {})[row["ranks"], row["tokens"]] = row["total_s"]
    lines = []
    for title, fast, slow in (
        ("LASP-2 (all_gather) over LASP as published (ring_blocking)", ("linear", "all_gather"), ("linear", "ring_blocking")),
        ("LASP-2 (all_gather) over LASP, local work first (ring)", ("linear", "all_gather"), ("linear", "ring")),
        ("LASP-2 (all_gather) over ring attention on the linear layer (kv_ring)", ("linear", "all_gather"), ("linear", KV_RING)),
        ("LASP-2 (all_gather) over softmax ring attention of that shape", ("linear", "all_gather"), ("softmax", "ring")),
        ("all_scan over all_gather", ("linear", "all_scan"), ("linear", "all_gather")),
    ):
        times = found.get(slow, {})
        ratios = [
            f"P = {where[0]}, {where[1]:,} tokens: {times[where] / seconds - 1:+.1%}"
            for where, seconds in found.get(fast, {}).items()
            if where in times
        ]
        if ratios:
            lines.append(f"speed of {title}: " + "; ".join(ratios))
    return lines


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="longhaul bench engines", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], help="processes (default: 2)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048], help="tokens of the sequence (default: 2048)")
    parser.add_argument("--exchanges", nargs="*", choices=LINEAR, default=list(LINEAR), metavar="NAME", help="(default: all)")
    parser.add_argument("--attention", nargs="*", choices=SOFTMAX, default=["ring"], metavar="NAME", help="(default: ring)")
    parser.add_argument("--heads", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--width", type=int, default=64, help="of keys and values (default: %(default)s)")
    parser.add_argument("--delay", type=float, default=0.0, help="ms of the emulated wire (default: no wire)")
    parser.add_argument("--bandwidth", type=float, default=0.0, help="MB/s of the emulated wire (default: unlimited)")
    parser.add_argument("--compute", choices=("real", "sleep"), default="real", help="(default: %(default)s)")
    parser.add_argument("--scan-blocks", type=int, help="blocks of a state in all_scan (default: as it thinks best)")
    parser.add_argument("--repeats", type=int, default=7, help="pairs of runs (default: %(default)s)")
    parser.add_argument("--regret", action="store_true", help="`auto` against the best exchange over a grid of wires")
    parser.add_argument("--delays", type=float, nargs="+", default=[0.1, 1, 5], help="ms, of the grid (default: 0.1 1 5)")
    parser.add_argument("--bandwidths", type=float, nargs="+", default=[20, 200, 2000], help="MB/s (default: 20 200 2000)")
    parser.add_argument("--maps", nargs="+", choices=regret.MAPS, default=["scalar"], help="kinds, of the grid (default: scalar)")
    parser.add_argument("--namespaces", action="store_true", help="a network namespace for every rank (Linux, root)")
    parser.add_argument("--rate", help="of each namespace, as tc writes it: 200mbit (default: unlimited)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args(argv)
    least = {"ranks": 2, "lengths": max(options.ranks), "heads": 1, "width": 1, "repeats": 1}
    for name, smallest in least.items():
        value = getattr(options, name)
        if min(value) < smallest if isinstance(value, list) else value < smallest:
            raise UserError(f"--{name} is {value}: give at least {smallest}.")
    if options.scan_blocks is not None and options.scan_blocks < 1:
        raise UserError(f"--scan-blocks is {options.scan_blocks}: give at least 1, or leave it out.")
    for name in ("delay", "bandwidth"):
        if getattr(options, name) < 0 or min(getattr(options, f"{name}s")) < 0:
            raise UserError(f"--{name} is below 0: leave it out for none.")
    if options.namespaces:
        if options.delay or options.bandwidth or options.regret:
            raise UserError("--namespaces has its own wire: leave out --delay, --bandwidth and --regret; give --rate.")
        namespaces.check()
    elif options.rate:
        raise UserError(f"--rate {options.rate} is of --namespaces: add that, or give --bandwidth instead.")
    return options


def main(argv: Sequence[str]) -> int:
    """`longhaul bench engines`."""
    options = _arguments(argv)
    console = Console() if sys.stdout.isatty() else Console(width=150)  # a file has no width to fit in
    layer = Layer(options.heads, options.width)
    rows: list[dict[str, Any]]
    if options.regret:
        wires = [(delay, bandwidth) for delay in options.delays for bandwidth in options.bandwidths]
        layers = [layer._replace(dense=maps == "dense") for maps in options.maps]
        rows = regret.run(options.ranks, options.lengths, wires, layers, options.repeats, options.json)
        regret.show(rows, console)
    else:
        rows = run(options)
        show(rows, options, console)
    if options.json is not None and not options.regret:
        shared = {"heads": layer.heads, "width": layer.width, "delay_ms": options.delay, "bandwidth_mb_s": options.bandwidth}
        options.json.write_text(json.dumps({**shared, "compute": options.compute, "rows": rows}, indent=1) + "\n")
    return 0
