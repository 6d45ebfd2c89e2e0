"""Several pools of ranks at once: while the ranks of one wait for a message, those of another compute."""

from __future__ import annotations

import itertools
import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from .cells import Cell
from .ranks import Answer, Job, Pool
from .topologies.job import Asked

Said = tuple[Any, list[Answer], float]  # a cell or a case of a topology; seconds in its pool

PROCESSES_A_CORE = 3  # a rank waits most of the time


def crew_size(ranks: int, device: str) -> int:
    """How many pools of so many ranks keep this machine busy; on GPUs one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if device == "cuda" else max(1, min(cores, PROCESSES_A_CORE * cores // ranks))


class Crew:
    """Pools of one size that share cells: each takes the next ones that share a reference.

    Args:
        pools: at least one; or the job this process is in, alone.
    """

    def __init__(self, pools: Sequence[Pool] | Sequence[Job]) -> None:
        self.pools = pools
        self._lock, self._stopped = threading.Lock(), threading.Event()

    def run_all(self, cells: Sequence[Cell] | Sequence[Asked]) -> Iterator[Said]:
        """The answers on all cells; in order, if there is one pool."""
        if len(self.pools) == 1:
            yield from _timed(self.pools[0], cells)
            return
        groups = itertools.groupby(cells, key=lambda cell: cell.reference)
        batches = iter([list(group) for _, group in groups])
        said: queue.SimpleQueue[Said | BaseException | None] = queue.SimpleQueue()
        threads = [threading.Thread(target=self._work, args=(pool, batches, said), daemon=True) for pool in self.pools]
        for thread in threads:
            thread.start()
        working = len(threads)
        try:
            while working:
                found = said.get()
                if isinstance(found, BaseException):
                    raise found
                if found is None:
                    working -= 1
                else:
                    yield found
        finally:  # of all cells, or of the patience of whoever asks
            self._stopped.set()
            if working:
                for pool in self.pools:
                    assert isinstance(pool, Pool)
                    pool.abort()
            for thread in threads:
                thread.join()

    def _work(self, pool: Pool, batches: Iterator[list[Any]], said: queue.SimpleQueue[Said | BaseException | None]) -> None:
        try:
            while not self._stopped.is_set():
                with self._lock:
                    batch = next(batches, None)
                if batch is None:
                    break
                for found in _timed(pool, batch):
                    said.put(found)
                    if self._stopped.is_set():
                        break
            said.put(None)
        except BaseException as error:  # for the thread that asks
            said.put(error)

    def close(self) -> None:
        """Let the ranks go."""
        for pool in self.pools:
            pool.close()


def _timed(pool: Pool | Job, cells: Sequence[Any]) -> Iterator[Said]:
    start = time.perf_counter()
    for cell, answers in zip(cells, pool.run_all(cells)):
        now = time.perf_counter()
        yield cell, answers, now - start
        start = now
