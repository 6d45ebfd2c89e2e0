"""Run a function on a few fresh processes of this machine, in one group."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing
from torch.multiprocessing.spawn import spawn

from longhaul.parallel.runtime import Runtime

Result = dict[str, Any]


def run_on_ranks(function: Callable[..., Result], world_size: int, threads: int, *args: Any) -> list[Result]:
    """`function(runtime, *args)` on every rank; what each returned.

    Args:
        function: a top-level function.
        threads: of each process.
    """
    with tempfile.TemporaryDirectory(prefix="longhaul-bench-") as folder:
        context = multiprocessing.get_context("spawn")
        answers = context.SimpleQueue()
        running = spawn(_rank, (function, world_size, threads, folder, answers, args), nprocs=world_size, join=False)
        results: dict[int, Result] = {}
        finished = False
        while len(results) < world_size:
            # Taken while they run: a pipe holds little, and a rank that cannot hand its answer over keeps the others waiting.
            while not answers.empty():
                rank, result = answers.get()
                results[rank] = result
            assert len(results) == world_size or not finished, "a rank ended without an answer"
            finished = finished or running.join(timeout=0.05)
        while not finished:
            finished = running.join()
    return [results[rank] for rank in range(world_size)]


def _rank(
    rank: int, function: Callable[..., Result], world_size: int, threads: int, folder: str, answers: Any, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(threads)
    runtime = Runtime(rank, world_size, init_method=f"file://{Path(folder) / 'rendezvous'}", device="cpu")
    try:
        answers.put((rank, function(runtime, *args)))
        runtime.barrier()
    finally:
        runtime.close()
