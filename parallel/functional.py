"""Differentiable collectives.

The objective is the sum over ranks of local losses, so the adjoint of a gather is a reduce-scatter, and of a sum a sum.
Replicated values (states) carry whole cotangents on every rank: `enter_replicated` and `leave_replicated` convert.
In a recomputed forward nothing is sent: the tape gives back what was received.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longhaul.models.ops import recompute

from .comm import Comm


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm, label: str) -> Tensor:  # type: ignore[override]
        ctx.comm, ctx.label = comm, label
        return recompute.begin(lambda: comm.all_gather(x, f"{label} forward")).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.comm.reduce_scatter(grad, f"{ctx.label} backward").wait(), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm, label: str) -> Tensor:  # type: ignore[override]
        ctx.comm, ctx.label = comm, label
        return recompute.begin(lambda: comm.all_reduce(x, f"{label} forward")).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.comm.all_reduce(grad, f"{ctx.label} backward").wait(), None, None


class _EnterReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm, label: str) -> Tensor:  # type: ignore[override]
        ctx.comm, ctx.label = comm, label
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.comm.all_reduce(grad, f"{ctx.label} backward").wait(), None, None


class _LeaveReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm) -> Tensor:  # type: ignore[override]
        ctx.counted = comm.rank == 0
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad if ctx.counted else torch.zeros_like(grad), None


def gather(x: Tensor, comm: Comm, label: str) -> Tensor:
    """[...] -> [P, ...], every rank's `x`; gradients are summed back to their owners."""
    return _Gather.apply(x, comm, label)


def all_sum(x: Tensor, comm: Comm, label: str) -> Tensor:
    """The sum of `x` over ranks, for use in every rank's own loss."""
    return _Sum.apply(x, comm, label)


def enter_replicated(x: Tensor, comm: Comm, label: str) -> Tensor:
    """A replicated value that each rank uses for its own part: their gradients add up to the whole cotangent."""
    return _EnterReplicated.apply(x, comm, label)


def leave_replicated(x: Tensor, comm: Comm) -> Tensor:
    """A value every rank computed alike, handed out as replicated: its whole cotangent is counted once."""
    return _LeaveReplicated.apply(x, comm)
