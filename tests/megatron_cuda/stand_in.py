"""A `torch.cuda` that is the CPU, so that megatron-core's model, schedules and optimizer run without a GPU.

Only for megatron-core 0.16.1, only on one stream, and only in a process of its own: `install` is never undone. Tensors stay CPU
tensors; what is replaced is where Megatron asks for the current device, for generators and for streams that do not matter here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _OnTheCPU(TorchFunctionMode):
    """Literal `device="cuda"`, `.cuda()`, and the names of types that the optimizers ask for."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if function is Tensor.cuda:
            return args[0]
        if function is Tensor.type and len(args) == 1 and not options:
            return function(args[0]).replace("torch.", "torch.cuda.")
        if "device" in options and options["device"] is not None and torch.device(options["device"]).type == "cuda":
            options["device"] = CPU
        return function(*args, **options)


@contextlib.contextmanager
def _one_stream(stream: Any = None) -> Iterator[None]:
    yield


class _Stream:
    """One stream: everything is in order already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass


def install() -> None:
    """Before Megatron is imported."""
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment,return-value]
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.Stream, torch.cuda.stream = _Stream, _one_stream  # type: ignore[assignment,misc]
    torch.cuda.current_stream = torch.cuda.default_stream = lambda device=None: _Stream()  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda device=None: None  # type: ignore[assignment]
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    _OnTheCPU().__enter__()
