"""Activation checkpointing in which recomputation sends nothing.

A recomputed forward must not talk: its ranks would have to recompute in step, and the wire would carry everything twice.
A tape therefore keeps what crossed the wire in the first forward (incoming states, halos, attention outputs), and the
recomputed forward reads it back in the same order.

    none        every tensor that a backward reads is kept
    full        a region's arguments, and what crossed the wire
    selective   these, and what is dear: results of scans and attentions, and products with weights. Norms, activations,
                gates, convolutions and rotations are computed again, and cost next to nothing

What is kept may wait in the host's memory (`offload`): copied there when it is made and back when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

R = TypeVar("R")

MODES = ("none", "selective", "full")
SMALL = 1 << 12  # elements; a tensor with fewer is not worth a copy to the host

_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm.default, _ATEN.addmm.default, _ATEN._scaled_mm.default}


class Pending(Protocol):
    """Something under way; `wait` returns its result."""

    def wait(self) -> Any: ...


class _Kept(NamedTuple):
    """A tensor on a tape. `version` tells whether someone wrote to it since."""

    value: Any
    version: int | None


class Host:
    """Where kept tensors wait under `offload`. Tensors that live there anyway stay as they are."""

    @staticmethod
    def put(tensor: Tensor) -> Any:
        """Copy to page-locked memory, in the order of the device's work; its own memory is free for what comes after."""
        if tensor.device.type == "cpu":
            return tensor
        copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")
        return tensor.device, copy.copy_(tensor.detach(), non_blocking=True)

    @staticmethod
    def get(held: Any) -> Tensor:
        """The tensor that `put` was given."""
        if isinstance(held, Tensor):
            return held
        device, copy = held
        return copy.to(device, non_blocking=True)


def _movable(tensor: Tensor) -> bool:
    """Large, and an activation: parameters, and views of them, are there in any case."""
    parameter = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
    return type(tensor) is Tensor and tensor.numel() >= SMALL and not parameter


class _Stays(NamedTuple):
    tensor: Tensor


def _offloading() -> AbstractContextManager[Any]:
    """What autograd saves goes to the host; a tensor that several operations save goes there once."""
    gone = WeakTensorKeyDictionary()  # tensor -> what `Host.put` made of it, and of which version

    def pack(tensor: Tensor) -> Any:
        if not _movable(tensor):
            return _Stays(tensor)
        held, version = gone.get(tensor, (None, -1))
        if version != tensor._version:
            held = Host.put(tensor)
            gone[tensor] = held, tensor._version
        return held

    return torch.autograd.graph.saved_tensors_hooks(
        pack, lambda held: held.tensor if isinstance(held, _Stays) else Host.get(held)
    )


class Tape:
    """What one checkpointed region keeps, in order.

    Args:
        selective: keep what is dear, too.
        offload: in the host's memory.
    """

    def __init__(self, selective: bool = False, offload: bool = False) -> None:
        self.selective, self.offload = selective, offload
        self.kept: list[Any] = []
        self.last: int | None = None
        """The slot of the last product, if nothing was kept after it: mostly what is added to the stream of tokens, which no
        backward reads. It is dropped at the end."""
        self.replaying = False
        self.cursor = 0

    def reserve(self) -> int:
        """A place, taken when work starts: several exchanges may be under way at once."""
        if self.last is not None and self.offload:
            self.put(self.last, _get(self.kept[self.last][0]))
        self.last = None
        self.kept.append(None)
        return len(self.kept) - 1

    def put(self, slot: int, value: Any, last: bool = False) -> None:
        """Keep a value; if it may yet be dropped, where it is."""
        self.kept[slot] = (tree_map_only(Tensor, lambda tensor: self._put(tensor, self.offload and not last), value),)
        self.last = slot if last else self.last

    def next(self) -> tuple[Any] | None:
        """What was kept, in a tuple; None if it was dropped."""
        entry = self.kept[self.cursor]
        self.cursor += 1
        return None if entry is None else (tree_map_only(_Kept, _get, entry[0], is_leaf=lambda leaf: isinstance(leaf, _Kept)),)

    def finish(self) -> None:
        """The first forward is done."""
        if self.last is not None:
            self.kept[self.last] = None

    def _put(self, tensor: Tensor, offload: bool) -> _Kept:
        # Detached: a kept tensor that hung on the graph would keep the graph, and the graph keeps the tape.
        # Below autograd, where products are kept, a view would else not see that its base is written to.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            tensor = tensor.detach()
        if offload and _movable(tensor):
            return _Kept(Host.put(tensor), None)
        return _Kept(tensor, tensor._version)


def _get(kept: _Kept) -> Tensor:
    if kept.version is None:
        return Host.get(kept.value)
    assert kept.value._version == kept.version, "a tensor that is kept for the backward was written to"
    return kept.value.detach()


_TAPE: ContextVar[Tape | None] = ContextVar("longhaul_tape", default=None)


@contextmanager
def _using(tape: Tape | None) -> Iterator[None]:
    token = _TAPE.set(tape)
    try:
        yield
    finally:
        _TAPE.reset(token)


class _Recorded:
    def __init__(self, start: Callable[[], Pending], tape: Tape) -> None:
        self.tape, self.slot = tape, tape.reserve()
        with _using(None):  # a recomputation does none of it, so nothing in it may take a place on the tape
            self.pending = start()

    def wait(self) -> Any:
        with _using(None):
            value = self.pending.wait()
        self.tape.put(self.slot, value)
        return value


class _Done:
    def __init__(self, value: Any) -> None:
        self.value = value

    def wait(self) -> Any:
        return self.value


class _Later:
    """Work that starts when it is waited for. No class made in the call: it would hold all that `compute` holds in a cycle."""

    def __init__(self, compute: Callable[[], Any]) -> None:
        self.compute = compute

    def wait(self) -> Any:
        return self.compute()


def taped() -> bool:
    """Whether this forward is to be recomputed, or is being so: it may then save for its backward what both can have."""
    return _TAPE.get() is not None


def begin(start: Callable[[], Pending]) -> Pending:
    """Start an exchange, or, in a recomputed forward, take what it brought the first time."""
    tape = _TAPE.get()
    if tape is None:
        return start()
    if tape.replaying:
        kept = tape.next()
        assert kept is not None, "what crossed the wire is never dropped"
        return _Done(kept[0])
    return _Recorded(start, tape)


def keep(compute: Callable[[], R]) -> R:
    """`compute()`, or, in a recomputed forward, what it returned the first time. For results without a graph."""
    result: R = begin(lambda: _Later(compute)).wait()
    return result


def dear(compute: Callable[[], R]) -> R:
    """`keep`, of what takes long and sends nothing (or keeps by itself what it sent): only if dear results are kept."""
    tape = _TAPE.get()
    return keep(compute) if tape is not None and tape.selective else compute()


class _KeepProducts(TorchDispatchMode):
    """Products with weights are dear."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tape = _TAPE.get()
        if tape is None or func not in _PRODUCTS:
            return func(*args, **(kwargs or {}))
        if tape.replaying:
            kept = tape.next()
            return func(*args, **(kwargs or {})) if kept is None else kept[0]
        slot, out = tape.reserve(), func(*args, **(kwargs or {}))
        tape.put(slot, out, last=True)
        return out


@contextmanager
def _running(tape: Tape, replaying: bool) -> Iterator[None]:
    tape.replaying, tape.cursor = replaying, 0
    with _using(tape), _KeepProducts() if tape.selective else nullcontext():
        yield
    if not replaying:
        tape.finish()


class _Replay:
    """`_running` of a recomputation. It may be entered again: a pipeline may run a backward in two halves."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    def __enter__(self) -> None:
        self.context = _running(self.tape, True)
        self.context.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self.context.__exit__(*error)


def checkpoint(function: Callable[..., R], *args: Any, mode: str = "full", offload: bool = False) -> R:
    """Run `function` keeping less for its backward; the rest is recomputed there, sending nothing.

    Args:
        mode: `none`, `selective` or `full`.
        offload: what is kept waits in the host's memory.
    """
    assert mode in MODES, mode
    if not torch.is_grad_enabled():
        return function(*args)
    with _offloading() if offload else nullcontext():
        if mode == "none":
            return function(*args)
        tape = Tape(mode == "selective", offload)
        return torch.utils.checkpoint.checkpoint(
            function,
            *args,
            use_reentrant=False,
            context_fn=lambda: (_running(tape, False), _Replay(tape)),
        )
