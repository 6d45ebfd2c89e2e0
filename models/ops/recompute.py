"""Activation checkpointing in which recomputation sends nothing.

A recomputed forward must not talk: its ranks would have to recompute in step, and the wire would carry everything twice.
A tape therefore keeps what crossed the wire in the first forward (incoming states, halos, attention outputs), and the
recomputed forward reads it back in the same order. Nothing else is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import torch.utils.checkpoint

R = TypeVar("R")


class Pending(Protocol):
    """Something under way; `wait` returns its result."""

    def wait(self) -> Any: ...


class Tape:
    """What crossed the wire in one checkpointed region, in order."""

    def __init__(self) -> None:
        self.kept: list[Any] = []
        self.replaying = False
        self.cursor = 0

    def next(self) -> Any:
        value = self.kept[self.cursor]
        self.cursor += 1
        return value


_TAPE: ContextVar[Tape | None] = ContextVar("longhaul_tape", default=None)


class _Recorded:
    def __init__(self, pending: Pending, tape: Tape) -> None:
        # The place on the tape is taken when the exchange starts: several may be under way at once.
        self.pending, self.tape, self.slot = pending, tape, len(tape.kept)
        tape.kept.append(None)

    def wait(self) -> Any:
        self.tape.kept[self.slot] = value = self.pending.wait()
        return value


class _Replayed:
    def __init__(self, value: Any) -> None:
        self.value = value

    def wait(self) -> Any:
        return self.value


def taped() -> bool:
    """Whether this forward is to be recomputed, or is being so: it may then save for its backward what both can have."""
    return _TAPE.get() is not None


def begin(start: Callable[[], Pending]) -> Pending:
    """Start an exchange, or, in a recomputed forward, take what it brought the first time."""
    tape = _TAPE.get()
    if tape is None:
        return start()
    if tape.replaying:
        return _Replayed(tape.next())
    return _Recorded(start(), tape)


def keep(compute: Callable[[], R]) -> R:
    """`compute()`, or, in a recomputed forward, what it returned the first time. For results without a graph."""

    class Done:
        def wait(self) -> R:
            return compute()

    return begin(Done).wait()


@contextmanager
def _running(tape: Tape, replaying: bool) -> Iterator[None]:
    tape.replaying, tape.cursor = replaying, 0
    token = _TAPE.set(tape)
    try:
        yield
    finally:
        _TAPE.reset(token)


def checkpoint(function: Callable[..., R], *args: Any) -> R:
    """Run `function` without keeping its activations; they are recomputed in the backward, sending nothing."""
    tape = Tape()
    return torch.utils.checkpoint.checkpoint(
        function,
        *args,
        use_reentrant=False,
        context_fn=lambda: (_running(tape, False), _running(tape, True)),
    )
