"""How a process on the CPU treats memory that a tensor leaves behind.

glibc takes every block above 32 MiB from the system and gives it back when it is freed. The next tensor of that size then
faults in each of its pages again, which costs more than many ops on it: 8,192 tokens of a mixture of memories spent more
time in the kernel than in arithmetic. Kept in the heap, the same pages serve the next tensor. The price is memory where large
tensors come and go between small ones that stay: half as much again was seen with activations recomputed. The chunks of a
stream (`train.stream_tokens`) are alike, and each finds the pages of the one before: 64 of them needed 265 MiB above the start
this way and 275 MiB without, with 8 thousand faults instead of 176 thousand. But holes drift: over hundreds of chunks pages
come to be held that no single chunk needs, a tenth of the peak in 512 runs. So every 64 runs all free pages are given back.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from typing import Any

# Parameters of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4

RUNS = 64  # of a model on chunks, between two times that free pages are given back


def keep_freed_memory() -> bool:
    """Keep what tensors free for the tensors to come; True if that was set.

    Does nothing where the C library is not glibc, or where the environment already says how malloc is to behave.
    """
    if not _may_tell():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    options = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 << 20))
    return all(mallopt(option, value) == 1 for option, value in options)


def giving_back(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, before every 64th call of which the process gives its free pages back, under the same conditions."""
    if not _may_tell():
        return run
    calls, trim = 0, ctypes.CDLL(None).malloc_trim

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if calls % RUNS == 0:
            trim(0)
        calls += 1
        return run(*args, **kwargs)

    return counted


def _may_tell() -> bool:
    return platform.libc_ver()[0] == "glibc" and not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
