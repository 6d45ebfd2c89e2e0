"""Uninitialised memory is NaN in tests.

A receive buffer that nobody filled usually holds zeros, and a test passes by luck. With the poison in place it holds
NaN (integers: the largest value), which no comparison accepts.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

_FACTORIES: tuple[tuple[Any, str], ...] = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


def fill(tensor: torch.Tensor) -> torch.Tensor:
    """Overwrite `tensor` in place with values that no test accepts, and return it."""
    if tensor.numel() == 0 or tensor.is_meta:
        return tensor
    with torch.no_grad():
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.fill_(float("nan"))
        elif tensor.dtype is torch.bool:
            tensor.fill_(True)
        else:
            tensor.fill_(torch.iinfo(tensor.dtype).max)
    return tensor


def _filled(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        return fill(factory(*args, **kwargs))

    return create


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """While it is open, `torch.empty` and its kin return poison."""
    with torch.device("meta"):
        torch.empty(0)  # torch now remembers the true factories, to which a default device applies
    originals = [getattr(owner, name) for owner, name in _FACTORIES]
    for (owner, name), original in zip(_FACTORIES, originals, strict=True):
        setattr(owner, name, _filled(original))
    try:
        yield
    finally:
        for (owner, name), original in zip(_FACTORIES, originals, strict=True):
            setattr(owner, name, original)
