"""Differentiable collectives.

The objective is the sum over ranks of local losses, so the adjoint of a gather is a reduce-scatter, and of a sum a sum.
In a recomputed forward nothing is sent: the tape gives back what was received.

A collective in a backward must run on every rank, whatever a rank's data were. So each of these is one autograd function
whose outputs always depend on its inputs: a fold in which some rank happens to read nothing still answers its peers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longhaul.models.ops import recompute

from .comm import Comm


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm, label: str) -> Tensor:
        ctx.comm, ctx.label = comm, label
        return recompute.begin(lambda: comm.all_reduce(x, f"{label} forward")).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.comm.all_reduce(grad, f"{ctx.label} backward").wait(), None, None


Fold = Callable[[tuple[Tensor, ...], tuple[Tensor, ...] | None], tuple[tuple[Tensor, ...], ...]]


class _GatheredFold(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, fold: Fold, comm: Comm, label: str, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        element, state = tensors[:count], tensors[count:] or None
        dtype = element[0].dtype
        for tensor in element[1:]:
            dtype = torch.promote_types(dtype, tensor.dtype)
        flat = torch.cat([tensor.flatten(1).to(dtype) for tensor in element], dim=1)
        whole = recompute.begin(lambda: comm.all_gather(flat, f"{label} forward")).wait()  # [P, N, n]
        pieces = whole.split([tensor[0].numel() for tensor in element], dim=2)
        gathered = tuple(
            piece.reshape(comm.size, *tensor.shape).to(tensor.dtype) for piece, tensor in zip(pieces, element)
        )
        before, after = fold(gathered, state)
        outputs = tuple(tensor.clone() for tensor in (*before, *after))
        ctx.mark_non_differentiable(*(tensor for tensor in outputs if not tensor.is_floating_point()))
        ctx.fold, ctx.comm, ctx.label, ctx.count, ctx.kept = fold, comm, label, count, len(after)
        ctx.save_for_backward(*gathered, *(state or ()))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        comm: Comm = ctx.comm
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in ctx.saved_tensors]
        gathered, state = tuple(leaves[: ctx.count]), tuple(leaves[ctx.count :]) or None
        with torch.enable_grad():
            before, after = ctx.fold(gathered, state)
        # A state's cotangent is whole on every rank, so only one rank counts it.
        counted = [*grads[: len(before)], *(grads[len(before) :] if comm.rank == 0 else [None] * ctx.kept)]
        pairs = [(out, g) for out, g in zip((*before, *after), counted) if g is not None and out.requires_grad]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found: dict[int, Tensor] = {}
        if pairs:
            outs, cotangents = zip(*pairs)
            given = torch.autograd.grad(outs, wanted, cotangents, allow_unused=True, materialize_grads=True)
            found = {id(leaf): grad for leaf, grad in zip(wanted, given)}
        whole = [found.get(id(leaf), torch.zeros_like(leaf)) for leaf in leaves]
        flat = torch.cat([g.flatten(2) for g, leaf in zip(whole, gathered) if leaf.is_floating_point()], dim=2)
        own = comm.reduce_scatter(flat, f"{ctx.label} backward").wait()  # [P, N, n] -> [N, n]
        results: list[Tensor | None] = []
        start = 0
        for leaf in gathered:
            if not leaf.is_floating_point():
                results.append(None)
                continue
            stop = start + leaf[0, 0].numel()
            results.append(own[:, start:stop].reshape(leaf.shape[1:]).to(leaf.dtype))
            start = stop
        for leaf, grad, needed in zip(state or (), whole[ctx.count :], ctx.needs_input_grad[4 + ctx.count :]):
            summed = comm.all_reduce(grad, f"{ctx.label} state backward").wait() if needed else None
            results.append(summed if leaf.is_floating_point() else None)
        return None, None, None, None, *results


def gathered_fold(
    element: tuple[Tensor, ...], state: tuple[Tensor, ...] | None, fold: Fold, comm: Comm, label: str
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Gather small elements in one message and fold them the same way on every rank.

    Args:
        element: [N, ...] each; integers travel with them but carry no gradient.
        state: replicated tensors, or None.
        fold: from ([P, N, ...] each, state) to (what this rank takes, what is replicated); traced again in the backward.

    Returns:
        The two results of `fold`.
    """
    extra = () if state is None else state
    outputs = _GatheredFold.apply(fold, comm, label, len(element), *element, *extra)
    return outputs[: len(element)], outputs[len(element) :]


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        return tuple(None if tensor is None else tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return grads


def join(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The same tensors, of one autograd node.

    A backward that is cut in two (zero-bubble schedules) runs again, for the weights, from the nodes where a path from a
    parameter meets one from the input. With this before it, a communicating function that takes both is no such node.
    """
    return _Join.apply(*tensors)


def all_sum(x: Tensor, comm: Comm, label: str) -> Tensor:
    """The sum of `x` over ranks, for use in every rank's own loss."""
    return _Sum.apply(x, comm, label)


class _CopyToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm) -> Tensor:
        ctx.comm = comm
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.comm.all_reduce(grad, "to heads backward").wait(), None


class _SumFromHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm) -> Tensor:
        return comm.all_reduce(x, "from heads forward").wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def copy_to_heads(x: Tensor, comm: Comm) -> Tensor:
    """Megatron's `f`: what all ranks hold, for each rank's own heads. Its gradient is the sum of all heads' parts."""
    return _CopyToHeads.apply(x, comm)


def sum_from_heads(x: Tensor, comm: Comm) -> Tensor:
    """Megatron's `g`: the sum of all heads' parts on every rank. Unlike `all_sum`'s, its gradient is whole on every rank."""
    return _SumFromHeads.apply(x, comm)


def rows_of(num_rows: int, comm: Comm) -> tuple[int, int]:
    """The rows of this rank if `num_rows` are divided in consecutive runs; the last ranks may have fewer, or none."""
    each = -(-num_rows // comm.size)
    return min(comm.rank * each, num_rows), min((comm.rank + 1) * each, num_rows)


def _gather(x: Tensor, num_rows: int, comm: Comm, label: str) -> Tensor:
    each = -(-num_rows // comm.size)
    padded = x if x.shape[0] == each else torch.cat([x, x.new_zeros(each - x.shape[0], *x.shape[1:])])
    return comm.all_gather(padded, label).wait().flatten(0, 1)[:num_rows]


def _scatter(x: Tensor, comm: Comm, label: str) -> Tensor:
    num_rows = x.shape[0]
    each = -(-num_rows // comm.size)
    padded = torch.cat([x, x.new_zeros(comm.size * each - num_rows, *x.shape[1:])])
    start, stop = rows_of(num_rows, comm)
    return comm.reduce_scatter(padded.unflatten(0, (comm.size, each)), label).wait()[: stop - start]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, num_rows: int, comm: Comm, label: str) -> Tensor:
        ctx.comm, ctx.label = comm, label
        return recompute.keep(lambda: _gather(x, num_rows, comm, f"{label} forward"))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _scatter(grad, ctx.comm, f"{ctx.label} backward"), None, None, None


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm, label: str) -> Tensor:
        ctx.comm, ctx.label, ctx.num_rows = comm, label, x.shape[0]
        return recompute.keep(lambda: _scatter(x, comm, f"{label} forward"))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grad, ctx.num_rows, ctx.comm, f"{ctx.label} backward"), None, None


def gather_rows(x: Tensor, num_rows: int, comm: Comm, label: str) -> Tensor:
    """All `num_rows` rows of a tensor whose `rows_of` each rank holds: [n, ...] -> [num_rows, ...]."""
    return x if comm.size == 1 else _GatherRows.apply(x, num_rows, comm, label)


def scatter_sum(x: Tensor, comm: Comm, label: str) -> Tensor:
    """This rank's rows of the sum over ranks: [num_rows, ...] -> [n, ...]."""
    return x if comm.size == 1 else _ScatterRows.apply(x, comm, label)


def _travel(rows: Tensor, send: Sequence[int], receive: Sequence[int], comm: Comm, label: str) -> Tensor:
    shapes = [(count, *rows.shape[1:]) for count in receive]
    return torch.cat(comm.all_to_all(rows.split(list(send)), shapes, label).wait())


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: Sequence[int], receive: Sequence[int], comm: Comm, label: str) -> Tensor:
        ctx.send, ctx.receive, ctx.comm, ctx.label = send, receive, comm, label
        return recompute.keep(lambda: _travel(rows, send, receive, comm, f"{label} forward"))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _travel(grad, ctx.receive, ctx.send, ctx.comm, f"{ctx.label} backward"), None, None, None, None


def exchange_rows(rows: Tensor, send: Sequence[int], receive: Sequence[int], comm: Comm, label: str) -> Tensor:
    """The first `send[0]` rows to rank 0, the next to rank 1, ..: [sum of send, ...] -> [sum of receive, ...], by rank."""
    return _ExchangeRows.apply(rows, send, receive, comm, label)
