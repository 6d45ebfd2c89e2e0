"""Warm pools of ranks: `run_ranks(function, world_size, **kwargs)` runs a function on every rank of a real group.

One pool a (world size, backend), made at its first use and kept for the session. Ranks are forked from one fork
server that has imported torch: forking the test process itself hangs once torch has run a large backward in it, and
spawning imports torch in every rank. A failure ends its pool, because peers may hang in a collective; the next cell
gets a new one.
"""

import atexit
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from . import wire, worker

Result = TypeVar("Result")

START_TIMEOUT = 120.0  # seconds; a loaded machine imports torch slowly
GRACE = 0.2  # seconds in which a failure may turn out to be the echo of a rank that died
MAX_GROUPS = 64  # groups that cells made; each holds sockets and threads, so a pool with more is renewed
_PRELOAD = ("numpy", "pytest", "torch", "torch.distributed.tensor", "torch._dynamo", "tests.harness.worker")


class RankError(RuntimeError):
    """A rank failed. `rank` is the first that did, `kind` the name of its exception's class ("exit" if it died)."""

    def __init__(self, rank: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.rank = rank
        self.kind = kind


class RankTimeout(RankError):
    """Some ranks did not answer in time; `ranks` says which."""

    def __init__(self, ranks: list[int], message: str) -> None:
        super().__init__(ranks[0], "timeout", message)
        self.ranks = ranks


def backends(world_size: int) -> list[Any]:
    """Parameters for `pytest.mark.parametrize("backend", ...)`: gloo, and nccl where there is a GPU for each rank."""
    params = [pytest.param("gloo", id="gloo")]
    if torch.distributed.is_nccl_available() and torch.cuda.device_count() >= world_size:
        params.append(pytest.param("nccl", id="nccl", marks=pytest.mark.gpu))
    return params


BACKENDS = backends(world_size=1)


def run_ranks(
    function: Callable[..., Result],
    world_size: int,
    *,
    backend: str = "gloo",
    timeout: float = 60,
    **kwargs: Any,
) -> list[Result]:
    """Run `function(rank, world_size, **kwargs)` on every rank of a default process group.

    Tensors go in and come back by value (CPU, detached). Warning filters of the caller hold in the ranks.

    Args:
        function: a top-level function of an importable module.
        world_size: number of ranks.
        backend: "gloo" or "nccl"; a test whose machine has too few GPUs is skipped.
        timeout: seconds until the ranks are killed.

    Returns:
        The results, by rank.

    Raises:
        RankError: a rank raised or died; carries the traceback of the first.
        RankTimeout: ranks did not answer; carries their stacks.
    """
    if backend == "nccl" and torch.cuda.device_count() < world_size:
        pytest.skip(f"nccl needs {world_size} GPUs, this machine has {torch.cuda.device_count()}")
    call = wire.dumps((function, kwargs))
    cell = wire.dumps(worker.Cell(call, list(warnings.filters), timeout))
    pool = _pools.get((world_size, backend))
    if pool is None:
        pool = _pools[world_size, backend] = _Pool(world_size, backend)
    try:
        answers = pool.run(cell, timeout)
    except BaseException:  # KeyboardInterrupt too: the ranks are still busy with this cell
        del _pools[world_size, backend]
        pool.kill()
        raise
    if answers[0].groups > MAX_GROUPS:
        del _pools[world_size, backend]
        pool.close()
    return [wire.loads(answer.result) for answer in answers]


def start_server() -> None:
    """Start the fork server without waiting for it; what the caller has imported of Longhaul is imported there."""
    ours = sorted(name for name in sys.modules if name.startswith("longhaul."))
    multiprocessing.get_context("forkserver").set_forkserver_preload([*_PRELOAD, *ours])
    # CUDA asked through NVML: asked through its own runtime, it could not be used in a fork.
    changes = {
        "OMP_NUM_THREADS": "1",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def close_pools() -> None:
    """End all ranks."""
    while _pools:
        _pools.popitem()[1].close()


class _Pool:
    """The ranks of one (world size, backend)."""

    def __init__(self, world_size: int, backend: str) -> None:
        start_server()
        self.folder = Path(tempfile.mkdtemp(prefix="longhaul_ranks_"))
        self.channels: list[connection.Connection] = []
        self.processes: list[ForkServerProcess] = []
        self.setups = [
            worker.Setup(rank, world_size, backend, self.folder, START_TIMEOUT) for rank in range(world_size)
        ]
        context = multiprocessing.get_context("forkserver")
        try:
            for setup in self.setups:
                ours, theirs = context.Pipe()
                name = f"rank {setup.rank} of {world_size}"
                # Not a daemon: a cell may start processes of its own (data loading, checkpointing).
                process = context.Process(target=worker.serve, args=(theirs, setup), name=name)
                process.start()
                theirs.close()  # else the end of the rank would not close the channel
                self.channels.append(ours)
                self.processes.append(process)
            self._collect(START_TIMEOUT)
        except BaseException:
            self.kill()
            raise

    def run(self, cell: bytes, timeout: float) -> list[worker.Answer]:
        """Send one pickled `Cell` to every rank and wait for the answers."""
        for rank, channel in enumerate(self.channels):
            try:
                channel.send_bytes(cell)
            except (BrokenPipeError, ConnectionResetError):
                raise self._death(rank) from None
        return self._collect(timeout)

    def _collect(self, timeout: float) -> list[worker.Answer]:
        deadline = time.monotonic() + timeout
        answers: dict[int, worker.Answer] = {}
        failed: dict[int, worker.Answer] = {}
        waiting = list(range(len(self.channels)))
        while waiting:
            # The sentinel too: a process that a rank started may hold the channel open after the rank died.
            handles = [handle for rank in waiting for handle in (self.channels[rank], self.processes[rank].sentinel)]
            ready = connection.wait(handles, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in list(waiting):
                if self.channels[rank] in ready:
                    answers[rank] = self._receive(rank)
                    waiting.remove(rank)
                elif self.processes[rank].sentinel in ready:
                    raise self._death(rank)
                else:
                    continue
                if answers[rank].failure is not None:
                    failed[rank] = answers[rank]
                    deadline = min(deadline, time.monotonic() + GRACE)
        if failed:
            rank = min(failed, key=lambda each: failed[each].time)
            first = failed[rank]
            raise RankError(rank, first.kind, f"rank {rank} of {len(self.channels)} failed:\n{first.failure}")
        if waiting:
            raise self._time_out(waiting, timeout)
        return [answers[rank] for rank in range(len(self.channels))]

    def _receive(self, rank: int) -> worker.Answer:
        try:
            return wire.loads(self.channels[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            raise self._death(rank) from None

    def _death(self, rank: int) -> RankError:
        process = self.processes[rank]
        process.join(5)
        code = process.exitcode
        return RankError(rank, "exit", f"rank {rank} of {len(self.channels)} died without an answer, exit code {code}")

    def _time_out(self, ranks: list[int], timeout: float) -> RankTimeout:
        for rank in ranks:
            pid = self.processes[rank].pid
            assert pid is not None, "the process was started"
            try:
                os.kill(pid, worker.STACK_SIGNAL)
            except ProcessLookupError:
                continue  # it died this moment; it has no stack
        time.sleep(GRACE)
        stacks = "\n".join(f"rank {rank}:\n{self.setups[rank].stack_file.read_text()}" for rank in ranks)
        names = ", ".join(map(str, ranks))
        message = f"no answer within {timeout:g} s from ranks {names} of {len(self.channels)}; their stacks:\n{stacks}"
        return RankTimeout(ranks, message)

    def kill(self) -> None:
        """End the ranks at once, whatever they are doing."""
        for process in self.processes:
            process.kill()
        self._release(self.processes)

    def close(self) -> None:
        """Ask idle ranks to leave; kill those that do not."""
        farewell = wire.dumps(None)
        for channel in self.channels:
            try:
                channel.send_bytes(farewell)
            except (BrokenPipeError, ConnectionResetError):
                continue  # it died since its last cell
        deadline = time.monotonic() + 5
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
        self._release(self.processes)

    def _release(self, processes: Iterable[ForkServerProcess]) -> None:
        for process in processes:
            process.join()
            process.close()
        for channel in self.channels:
            channel.close()
        shutil.rmtree(self.folder, ignore_errors=True)


_pools: dict[tuple[int, str], _Pool] = {}
atexit.register(close_pools)
