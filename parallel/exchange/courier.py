"""A thread that keeps an exchange going while this rank does its local work.

A rank in the middle of a chain has to pass on what it gets. If it does so only when it waits, which is after its local
work, then everything behind it stands still for that long. Kernels of torch and waits of the backend let go of Python's
lock, so a second thread can apply a map and send it meanwhile.

For backends that match messages by tag (`Comm.tagged`), and tensors on the CPU: elsewhere the order of posts is the order of the
device's stream, which only one thread can keep.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import NamedTuple

import torch


class _Errand(NamedTuple):
    run: Callable[[], None]
    done: Future[None]
    inference: bool  # whether the thread that asked is in inference mode, which threads do not inherit


class Courier:
    """Runs errands one after the other, in the order in which they were given, beside the thread that gave them."""

    def __init__(self) -> None:
        self._errands: SimpleQueue[_Errand | None] | None = None

    def run(self, errand: Callable[[], None]) -> Future[None]:
        """Begin `errand`, without gradients; the result of what this returns raises what it raised."""
        if self._errands is None:
            self._errands = SimpleQueue()
            # Not to be waited for at exit: a peer that is gone would keep this process.
            threading.Thread(target=_serve, args=(self._errands,), name="longhaul courier", daemon=True).start()
            weakref.finalize(self, self._errands.put, None)
        done: Future[None] = Future()
        self._errands.put(_Errand(errand, done, torch.is_inference_mode_enabled()))
        return done


def _serve(errands: SimpleQueue[_Errand | None]) -> None:
    while (errand := errands.get()) is not None:
        try:
            with torch.inference_mode() if errand.inference else torch.no_grad():
                errand.run()
        except BaseException as error:  # whatever it is belongs to the thread that waits
            errand.done.set_exception(error)
        else:
            errand.done.set_result(None)
        del errand  # tensors would live until the next one
