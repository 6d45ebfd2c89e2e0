"""Signals that ask a run to stop: noted at once, acted on at the next step boundary.

Imports nothing slow: handlers are in place before torch is loaded, so that an early signal is not lost.
"""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

SAVED = 75
"""Exit code of a run that was asked to stop and can be resumed (EX_TEMPFAIL: try again)."""


class StopRequest:
    """SIGTERM, SIGUSR1 or Ctrl-C, remembered. A second Ctrl-C ends the process at once.

    Use as a context manager; handlers that were there before come back at its end.
    """

    def __init__(self) -> None:
        self.signal: int = 0
        """Number of the signal that came, 0 if none did."""
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if number == signal.SIGINT:
            # Not a handler in Python: that would wait for a collective in which this process may be stuck.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
