"""`longhaul bench overlap`: how much of a slow wire's delay a training step feels.

A state exchange is posted before the local work and waited for after it, forward and backward. So a wire that is slower
by less than the local work must cost next to nothing. The wire is emulated in-process: `wait` returns no earlier than the
delay after the post. Runs with and without delay take turns; the growth is the median of paired differences.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from longhaul.models.mixers.lightning import Lightning, LightningConfig
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import SequenceShard
from longhaul.parallel.comm import Ledger, Wire
from longhaul.parallel.engine import SequenceParallel
from longhaul.parallel.runtime import Runtime

from .ranks import run_on_ranks

WIDTH, HEADS = 512, 8


class Stopwatch(Ledger):
    """A ledger that also knows when things happened."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[tuple[str, float]] = []

    def mark(self, event: str) -> None:
        self.times.append((event, time.perf_counter()))

    def local_work(self) -> list[float]:
        """Seconds of each stretch of local work that a message may hide behind."""
        starts = [at for event, at in self.times if event == "local start"]
        ends = [at for event, at in self.times if event == "local end"]
        return [end - start for start, end in zip(starts, ends)]


def _layers(count: int) -> list[Lightning]:
    torch.manual_seed(0)
    layers = [Lightning(WIDTH, HEADS, LightningConfig(), layer, count) for layer in range(count)]
    for layer in layers:
        layer.reset_parameters()
    return layers


def _step(runtime: Runtime, layers: Sequence[Lightning], shard: SequenceShard, x: torch.Tensor) -> float:
    runtime.barrier()
    start = time.perf_counter()
    y = x
    for layer in layers:
        y = y + layer(y, shard)[0]
    y.square().mean().backward()
    return time.perf_counter() - start


def measure(runtime: Runtime, exchange: str, length: int, layers: int, repeats: int, share: float) -> dict[str, Any]:
    """On one rank: local work, then paired steps without and with a delay of `share` of the shortest local work."""
    stopwatch = Stopwatch()
    comm = runtime.comm(stopwatch)
    shard = SequenceParallel(comm, exchange=exchange).shard(Documents((0, length)))
    model = _layers(layers)
    x = torch.randn(shard.num_tokens, WIDTH, requires_grad=True)
    for _ in range(2):
        stopwatch.times.clear()
        _step(runtime, model, shard, x)
    local = min(stopwatch.local_work())
    # Microseconds, since ranks agree on integers; the shortest work of any rank counts.
    delay = share * 1e-6 * (1 << 30) - share * 1e-6 * runtime.maximum((1 << 30) - int(1e6 * local))
    pairs = []
    for repeat in range(repeats):
        seconds = {}
        for slow in (False, True) if repeat % 2 == 0 else (True, False):
            comm.wire = Wire(delay=delay) if slow else Wire()
            seconds[slow] = _step(runtime, model, shard, x)
        pairs.append((seconds[False], seconds[True]))
    return {"delay": delay, "local": local, "pairs": pairs, "exchanges": 2 * layers}


def main(argv: Sequence[str]) -> int:
    """`longhaul bench overlap`."""
    parser = argparse.ArgumentParser(prog="longhaul bench overlap", description=__doc__.splitlines()[0])
    parser.add_argument("--exchange", default="all_gather", help="(default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--length", type=int, default=8192, help="tokens of the sequence (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="Lightning layers of width 512 (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="pairs of steps (default: %(default)s)")
    parser.add_argument("--share", type=float, default=0.5, help="delay over local work (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args(argv)
    arguments = (options.exchange, options.length, options.layers, options.repeats, options.share)
    results = run_on_ranks(measure, options.ranks, 1, *arguments)
    pairs = [max(pair) for pair in zip(*(result["pairs"] for result in results))]  # the slowest rank sets a step
    growth = median(slow - fast for fast, slow in pairs)
    delay, count = results[0]["delay"], results[0]["exchanges"]
    result = {
        "exchange": options.exchange,
        "ranks": options.ranks,
        "delay_s": delay,
        "exchanges": count,
        "step_s": median(fast for fast, _ in pairs),
        "step_with_delay_s": median(slow for _, slow in pairs),
        "growth_over_total_delay": growth / (delay * count),
    }
    Console(highlight=False).print(
        f"{options.exchange} on {options.ranks} processes, {options.length:,} tokens, {options.layers} layers: "
        f"step {result['step_s']:.3f} s, with {1e3 * delay:.1f} ms more delay on each of {count} exchanges "
        f"{result['step_with_delay_s']:.3f} s; growth {growth * 1e3:+.1f} ms, "
        f"{result['growth_over_total_delay']:+.1%} of the delay added",
        soft_wrap=True,
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))
    return 0
