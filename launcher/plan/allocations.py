"""How many bytes of tensors lie in memory at most, from the profiler's record of every allocation."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile


@dataclass
class Allocations:
    """What happened while it was recorded."""

    peak: int = 0
    """The most bytes at one time, beyond those that lay there at the start."""
    left: int = 0
    """Bytes that lie there at the end, beyond those at the start."""


@contextmanager
def recorded() -> Iterator[Allocations]:
    """Record this thread's tensors on the CPU; what is yielded is filled in at the end."""
    found = Allocations()
    gc.collect()
    gc.disable()  # else what hangs in a cycle would go at a time of its own
    try:
        with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            yield found
    finally:
        gc.enable()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        found.left += event.nbytes()
        found.peak = max(found.peak, found.left)


@contextmanager
def settled() -> Iterator[None]:
    """The objects that are there are looked at no more: many recordings then collect in no time what each left in cycles."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _silent() -> Iterator[None]:
    """The profiler's library writes lines of its own to the standard error."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
