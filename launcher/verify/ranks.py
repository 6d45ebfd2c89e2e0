"""The processes that run cells: a warm pool of one world size, or the ranks of a job that is already running.

Pools are forked from one fork server that has imported everything: forking a process in which torch has run hangs, and
spawning imports torch in every rank. A failure ends its pool, because peers may wait in a collective; the next cell gets a
new one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing import connection, forkserver, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import torch

from longhaul.models.errors import UserError
from longhaul.parallel.comm import Comm
from longhaul.parallel.runtime import Runtime

from .cells import Cell
from .check import Checker, Findings
from .topologies.job import Asked
from .topologies.job import check as check_case
from .traffic import Question, count

START_TIMEOUT = 120.0  # seconds; a loaded machine imports torch slowly
CELL_TIMEOUT = 120.0
CASE_TIMEOUT = 600.0  # of a topology, whose reference may have to be made first
LIFETIME = 12  # cases of topologies that ranks run before they are renewed: each case makes groups, which stay
GRACE = 0.5  # seconds in which peers may say what they know of a failure
_STARTING = threading.Lock()  # pools may be started by several threads
AHEAD = 4  # cells that ranks have been asked: they do not wait for the parent between two


class Answer(NamedTuple):
    """What one rank says of a cell: findings, or why there are none ("refused" or "error")."""

    kind: str
    findings: Findings
    message: str = ""


def answer(checker: Checker, asked: Cell | Question | Asked) -> Answer:
    """Check a cell or a case of a topology, or count an engine's traffic; nothing is raised."""
    try:
        if isinstance(asked, Asked):
            return Answer("findings", check_case(asked, checker.runtime))
        if isinstance(asked, Question):
            return Answer("findings", count(asked, checker.comm, checker.inner, checker.outer))
        return Answer("findings", checker.check(asked))
    except UserError as error:
        return Answer("refused", {}, str(error))
    except Exception:
        return Answer("error", {}, traceback.format_exc(limit=-8))


class Job:
    """The ranks of the job this process is in: every rank runs every cell, and every rank gets all answers."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.checker = runtime, Checker(runtime)
        self.comm = Comm(self.checker.mesh.sequence_group)

    def run(self, cell: Cell) -> list[Answer]:
        """The answers of all ranks.

        Raises:
            RuntimeError: this rank broke down; its peers wait for it in a collective, so the job must end.
        """
        said = answer(self.checker, cell)
        if said.kind == "error":
            raise RuntimeError(f"cell {cell.key} broke on rank {self.runtime.rank}:\n{said.message}")
        own = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
        length = self.runtime.maximum(own.numel())
        padded = torch.full((length,), ord(" "), dtype=torch.uint8)
        padded[: own.numel()] = own
        rows = self.comm.all_gather(padded.to(self.runtime.device), "verify").wait().cpu()
        return [_answer(json.loads(bytes(row.tolist()))) for row in rows]

    def run_all(self, cells: Sequence[Cell]) -> Iterator[list[Answer]]:
        """The same for each of them, in order."""
        return (self.run(cell) for cell in cells)

    def close(self) -> None:
        """Nothing: the job goes on."""


def _answer(fields: list[Any]) -> Answer:
    kind, findings, message = fields
    return Answer(kind, {name: (value, limit) for name, (value, limit) in findings.items()}, message)


class Pool:
    """Processes of this machine that form one group.

    Args:
        size: ranks.
        device: "cpu" or "cuda" (one GPU each).
        lifetime: cells after which the processes are renewed; never if None.
        timeout: seconds for a cell.
    """

    def __init__(self, size: int, device: str, lifetime: int | None = None, timeout: float = CELL_TIMEOUT) -> None:
        self.size, self.device, self.lifetime, self.timeout = size, device, lifetime, timeout
        self.age = 0
        self.processes: list[Any] = []
        self.channels: list[Any] = []
        self.folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, asked: Cell | Question | Asked) -> list[Answer]:
        """The answers of all ranks. A rank that died or hangs is an "error"."""
        return next(self.run_all([asked]))

    def run_all(self, asked: Sequence[Cell | Question | Asked]) -> Iterator[list[Answer]]:
        """The same for each of them, in order; ranks are asked a few ahead."""
        sent = done = 0
        try:
            while done < len(asked):
                if not self.processes:
                    self._start()
                    sent = done  # what ranks before these had been asked they did not answer
                left = AHEAD if self.lifetime is None else min(AHEAD, self.lifetime - self.age)
                for question in asked[sent : done + left]:
                    self._send(question)
                sent = max(sent, min(done + left, len(asked)))
                answers = self._collect(self.timeout)
                done += 1
                self.age += 1
                if self.age == self.lifetime:
                    self.close()
                if any(found.kind == "error" for found in answers):
                    self.kill()
                    sent = done
                yield answers
        finally:
            if sent > done:  # after Ctrl-C, or for a reader who wants no more: the ranks are still busy
                self.kill()

    def _start(self) -> None:
        self.age = 0
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["longhaul.launcher.verify.ranks"])
        _start_server()
        self.folder = tempfile.TemporaryDirectory(prefix="longhaul-verify-")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            place = rank, self.size, self.folder.name, self.device, self.timeout
            process = context.Process(target=_serve, args=(theirs, *place), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.channels.append(ours)
        started = self._collect(START_TIMEOUT)
        failed = [found for found in started if found.kind == "error"]
        if failed:
            self.kill()
            raise RuntimeError(f"{self.size} ranks did not start:\n{failed[0].message}")

    def _send(self, asked: Cell | Question | Asked) -> None:
        for channel in self.channels:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a rank that died: it is found when it is read
                channel.send(asked)

    def _collect(self, timeout: float) -> list[Answer]:
        answers: dict[int, Answer] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < self.size:
            waiting = {self.channels[rank]: rank for rank in range(self.size) if rank not in answers}
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for channel in ready:
                rank = waiting[channel]
                try:
                    answers[rank] = Answer(*self.channels[rank].recv())
                except (EOFError, ConnectionResetError):
                    answers[rank] = Answer("error", {}, f"rank {rank} died")
                if answers[rank].kind == "error":
                    deadline = min(deadline, time.monotonic() + GRACE)
        silent = Answer("error", {}, "no answer: it waits for a rank that failed" if answers else f"no answer in {timeout:g} s")
        return [answers.get(rank, silent) for rank in range(self.size)]

    def abort(self) -> None:
        """End the ranks at once; whoever reads their answers in another thread finds them dead."""
        for process in list(self.processes):
            with contextlib.suppress(ValueError):  # that thread was faster
                process.kill()

    def kill(self) -> None:
        """End the ranks at once, and clean up."""
        for process in self.processes:
            process.kill()
        self._release()

    def close(self) -> None:
        """Ask the ranks to leave, and end those that do not."""
        for channel in self.channels:
            try:
                channel.send(None)
            except (BrokenPipeError, ConnectionResetError):
                continue  # it died since its last cell
        for process in self.processes:
            process.join(5)
            if process.exitcode is None:
                process.kill()
        self._release()

    def _release(self) -> None:
        for process in self.processes:
            process.join()
            process.close()
        for channel in self.channels:
            channel.close()
        if self.folder is not None:
            self.folder.cleanup()
        self.processes, self.channels, self.folder = [], [], None


def _start_server() -> None:
    """Start the fork server with one thread a process."""
    with _STARTING:
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        try:
            forkserver.ensure_running()
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before


def _serve(channel: connection.Connection, rank: int, size: int, folder: str, device: str, timeout: float) -> None:
    """The life of one rank."""
    _leave_with_parent()
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if Path("/sys/class/net/lo").exists() else "lo0")
    try:
        runtime = Runtime(rank, size, rank, f"file://{Path(folder) / 'rendezvous'}", device, timeout=timeout)
        checker = Checker(runtime)
        channel.send(tuple(Answer("findings", {})))
    except Exception:
        channel.send(tuple(Answer("error", {}, traceback.format_exc(limit=-8))))
        os._exit(1)
    try:
        while (asked := channel.recv()) is not None:
            said = answer(checker, asked)
            channel.send(tuple(said))
            if said.kind == "error":
                threading.Event().wait()  # for the end: peers wait in a collective, which the next cell's would meet
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(1)
    runtime.close()
    os._exit(0)  # no teardown of an interpreter whose threads may still hold sockets


def _leave_with_parent() -> None:
    """End this process when the command is gone, however it ended."""
    parent = parent_process()
    assert parent is not None, "a rank is started by the pool"

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
