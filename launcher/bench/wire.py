"""`longhaul bench wire`: the ledger's bytes beside the operating system's count on the loopback interface.

Between processes of one machine gloo talks over loopback, whose counters see every payload byte once, and headers and
acknowledgements besides. Run it on a quiet machine, or in a network namespace of its own: the counters see everything.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from longhaul.models.errors import UserError
from longhaul.parallel.runtime import Runtime

from .ranks import run_on_ranks

COUNTERS = Path("/proc/net/dev")
ELEMENTS = 12 << 18  # 2, 3 and 4 ranks share them evenly


def loopback_bytes() -> int:
    """Bytes received on loopback since the machine started."""
    for line in COUNTERS.read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[0])
    raise UserError(f"{COUNTERS} names no loopback interface lo: this check needs Linux.")


def measure(runtime: Runtime) -> dict[str, Any]:
    """Both counts of each collective, summed over ranks."""
    comm, P = runtime.comm(), runtime.world_size
    x = torch.randn(ELEMENTS)
    following, before = (comm.rank + 1) % P, (comm.rank - 1) % P
    kinds: dict[str, Callable[[], Any]] = {
        "all_gather": lambda: comm.all_gather(x, "wire").wait(),
        "reduce_scatter": lambda: comm.reduce_scatter(x.reshape(P, -1), "wire").wait(),
        "all_reduce": lambda: comm.all_reduce(x, "wire").wait(),
        "all_to_all": lambda: comm.all_to_all(list(x.chunk(P)), [(ELEMENTS // P,)] * P, "wire").wait(),
        "point to point": lambda: comm.exchange([(following, x)], [(before, torch.empty_like(x))], "wire").wait(),
    }
    result: dict[str, Any] = {}
    for name, call in kinds.items():
        call()
        comm.ledger.reset()
        runtime.barrier()
        start = loopback_bytes()
        call()
        runtime.barrier()
        counted = runtime.sum([float(comm.ledger.total().bytes)])[0]
        result[name] = (int(counted), loopback_bytes() - start)
    return result


def main(argv: Sequence[str]) -> int:
    """`longhaul bench wire`."""
    parser = argparse.ArgumentParser(prog="longhaul bench wire", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: %(default)s)")
    options = parser.parse_args(argv)
    if not COUNTERS.exists():
        raise UserError(f"This check reads {COUNTERS}, which exists on Linux only.")
    table = Table("collective", "counted, bytes", "loopback, bytes", "ratio", title=f"{options.ranks} processes")
    for name, (counted, seen) in run_on_ranks(measure, options.ranks, 1)[0].items():
        table.add_row(name, f"{counted:,}", f"{seen:,}", f"{seen / counted:.4f}")
    Console().print(table)
    return 0
