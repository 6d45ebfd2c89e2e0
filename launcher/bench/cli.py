"""The command `longhaul bench`: a table of benchmarks, each imported only when it runs."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from longhaul.models.errors import UserError

# Benchmark -> module with `main(argv) -> int`, and one line of help.
BENCHMARKS: dict[str, tuple[str, str]] = {
    "step": ("longhaul.launcher.bench.step", "a training step beside Hugging Face's, on the same weights"),
    "mixers": ("longhaul.launcher.bench.mixers", "speed and memory of every mixer's training step beside softmax attention's"),
    "generation": ("longhaul.launcher.bench.generation", "one token after a long context, every mixer beside softmax attention"),
    "overlap": ("longhaul.launcher.bench.overlap", "how much of a slow wire's delay a step feels"),
    "engines": ("longhaul.launcher.bench.engines", "exchanges and attention engines by length and ranks, and `auto`"),
    "wire": ("longhaul.launcher.bench.wire", "counted bytes beside the operating system's counters"),
    "planner": ("longhaul.launcher.bench.planner", "steps of long-tailed documents, planned and of one degree"),
    "stream": ("longhaul.launcher.bench.stream", "a training step on a stream longer than memory, chunk by chunk"),
    "rsa": ("longhaul.launcher.bench.rsa", "Ring Self-Attention and tensor parallelism: the most that fits"),
}


def main(argv: Sequence[str]) -> int:
    """Run one benchmark."""
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        lines = [f"  {name:10} {text}" for name, (_, text) in BENCHMARKS.items()]
        print("\n".join(["usage: longhaul bench NAME [ARGUMENTS]", "", *lines]))
        return 0
    if name not in BENCHMARKS:
        raise UserError(f"There is no benchmark {name!r}: the benchmarks are {', '.join(BENCHMARKS)}.")
    result: int = importlib.import_module(BENCHMARKS[name][0]).main(rest)
    return result
