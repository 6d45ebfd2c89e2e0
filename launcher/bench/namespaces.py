"""Ranks in network namespaces of their own, joined by a bridge whose ports have a rate: a wire that the kernel shapes.

Linux, root, and the commands `ip` and `tc` are needed. The token bucket filter shapes what a rank sends; delay needs netem,
which many kernels lack, so there is none here.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import multiprocessing
from torch.multiprocessing.spawn import spawn

from longhaul.models.errors import UserError

from .ranks import Result, _rank

CLONE_NEWNET = 0x40000000
INTERFACE = "eth0"


def check() -> None:
    """Refuse a machine that cannot make namespaces."""
    if os.name != "posix" or os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")):
        raise UserError("--namespaces needs root and the commands ip and tc of Linux: use --delay and --bandwidth instead.")


@contextmanager
def joined(count: int, rate: str | None) -> Iterator[list[str]]:
    """Names of `count` namespaces that reach each other through `eth0`, each sending at most `rate` (as tc writes it)."""
    tag = f"lh{os.getpid()}"
    names = [f"{tag}n{index}" for index in range(count)]
    try:
        _call("ip", "link", "add", tag, "type", "bridge")
        _call("ip", "link", "set", tag, "up")
        for index, name in enumerate(names):
            _call("ip", "netns", "add", name)
            inside = ("ip", "netns", "exec", name)
            _call("ip", "link", "add", f"{tag}v{index}", "type", "veth", "peer", "name", INTERFACE, "netns", name)
            _call("ip", "link", "set", f"{tag}v{index}", "master", tag, "up")
            _call(*inside, "ip", "address", "add", f"10.77.0.{index + 1}/24", "dev", INTERFACE)
            _call(*inside, "ip", "link", "set", "lo", "up")
            _call(*inside, "ip", "link", "set", INTERFACE, "up")
            if rate is not None:
                shape = ("rate", rate, "burst", "64kb", "latency", "400ms")
                _call(*inside, "tc", "qdisc", "add", "dev", INTERFACE, "root", "tbf", *shape)
        yield names
    finally:
        for name in names:
            subprocess.run(("ip", "netns", "delete", name), capture_output=True, check=False)
        subprocess.run(("ip", "link", "delete", tag), capture_output=True, check=False)


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"The command {' '.join(command)!r} failed: {done.stderr.strip()}; --namespaces cannot run here.")


def run_in_namespaces(
    function: Callable[..., Result], world_size: int, threads: int, rate: str | None, *args: Any
) -> list[Result]:
    """`run_on_ranks`, each rank in a namespace of its own."""
    with joined(world_size, rate) as names, tempfile.TemporaryDirectory(prefix="longhaul-bench-") as folder:
        answers = multiprocessing.get_context("spawn").SimpleQueue()
        spawn(_enter, (names, function, world_size, threads, folder, answers, args), nprocs=world_size, join=True)
        results = dict(answers.get() for _ in range(world_size))
    return [results[rank] for rank in range(world_size)]


def _enter(rank: int, names: Sequence[str], *args: Any) -> None:
    with open(f"/var/run/netns/{names[rank]}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
    _rank(rank, *args)
