"""The life of one rank: join the group, run cells, answer, leave.

Everything here runs in a process forked from the fork server; `pool.py` is the other end of the connection.
"""

import contextlib
import dataclasses
import faulthandler
import functools
import gc
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from . import poison, wire

STACK_SIGNAL = signal.SIGUSR2


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a rank needs to know before its first cell."""

    rank: int
    world_size: int
    backend: str
    folder: Path
    timeout: float

    @property
    def stack_file(self) -> Path:
        """Where this rank writes the stack of its threads when it gets `STACK_SIGNAL`."""
        return self.folder / f"stack_{self.rank}.txt"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One function call, pickled on its own so that an import error in it is an ordinary failure."""

    call: bytes
    filters: list[Any]
    timeout: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a rank says after its start and after every cell: a pickled result, or a failure."""

    result: bytes = b""
    groups: int = 0
    failure: str | None = None
    kind: str = ""
    time: float = 0.0


def serve(channel: connection.Connection, setup: Setup) -> None:
    """Join the process group, then run the cells that come over `channel` until it says None or closes."""
    _leave_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business; it closes the channel
    stack_file = setup.stack_file.open("w")
    faulthandler.register(STACK_SIGNAL, file=stack_file, all_threads=True)
    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays: it is not looked through for garbage, whose marks would copy its pages
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no look-up of the host's name
    with poison.poisoned():
        channel.send_bytes(wire.dumps(_guard(functools.partial(_join, setup))))
        with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
            while (cell := wire.loads(channel.recv_bytes())) is not None:
                channel.send_bytes(wire.dumps(_guard(functools.partial(_run, cell, setup))))
        if dist.is_initialized():
            dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # no teardown of an interpreter whose threads may still hold sockets


def _leave_with_parent() -> None:
    """End this process when the test process is gone, however it ended."""
    parent = parent_process()
    assert parent is not None, "a rank is started by the pool"

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _join(setup: Setup) -> None:
    device = None
    if setup.backend == "nccl":
        device = torch.device("cuda", setup.rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        setup.backend,
        init_method=f"file://{setup.folder / 'rendezvous'}",
        rank=setup.rank,
        world_size=setup.world_size,
        timeout=timedelta(seconds=setup.timeout),
        device_id=device,
    )


def _run(cell: Cell, setup: Setup) -> Any:
    function, kwargs = wire.loads(cell.call)
    # A cell must not depend on the cells before it.
    torch.manual_seed(0)
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    # A little longer than the parent waits, so that it is the parent that tells of all ranks.
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=cell.timeout + 10))
    with warnings.catch_warnings():
        warnings.filters[:] = cell.filters  # type: ignore[index]
        return function(setup.rank, setup.world_size, **kwargs)


def _guard(work: Callable[[], Any]) -> Answer:
    try:
        return Answer(result=wire.dumps(work()), groups=_group_count())
    except BaseException as error:
        kind = type(error).__name__
        return Answer(failure=traceback.format_exc(), kind=kind, time=time.monotonic())


def _group_count() -> int:
    return dist.distributed_c10d.get_pg_count() if dist.is_initialized() else 0
