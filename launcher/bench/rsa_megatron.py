"""Tensor parallelism as Ring Self-Attention's paper met it: Megatron-LM's of 2019 (Shoeybi et al., arXiv 1909.08053).

Longhaul's own (`longhaul.parallel.tensor`, after Korthikanti et al., arXiv 2205.05198) divides the tokens between layers among
the ranks. In 2019 every rank kept all of them there: `f` before a layer copies, and sums gradients in the backward; `g` after it
sums, and copies gradients. Heads, inner channels and the vocabulary are cut alike in both, so a model cut by `TensorParallel`
serves here too. What lies outside of layers is computed alike on every rank: its gradients are whole, and are not summed.

Letters: T tokens, T' those of them that a rank answers for in the newer way, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from longhaul.models.encoder import Encoder
from longhaul.parallel.comm import Comm
from longhaul.parallel.functional import copy_to_heads, gather_rows, rows_of, sum_from_heads
from longhaul.parallel.shard import RankShard


class WholeBetweenLayers(RankShard):
    """A shard whose activations between layers are whole on every rank of the tensor group."""

    def share(self, x: Tensor) -> Tensor:
        return x

    def to_heads(self, x: Tensor) -> Tensor:
        return copy_to_heads(x, self.tensor)

    def from_heads(self, x: Tensor) -> Tensor:
        return sum_from_heads(x, self.tensor)


def keep_whole(model: Encoder, comm: Comm) -> None:
    """Let the ends of a model that `TensorParallel` cut give and take all tokens, in place."""
    model.embedding = _Embedding(model.embedding, comm)  # type: ignore[assignment]
    model.head = _Head(model.head, comm)  # type: ignore[assignment]


class _Embedding(nn.Module):
    """int64 [T] -> [T, D]."""

    def __init__(self, inner: nn.Module, comm: Comm) -> None:
        super().__init__()
        self.inner, self.comm = inner, comm

    def forward(self, tokens: Tensor) -> Tensor:
        return _Gather.apply(self.inner(tokens), tokens.shape[0], self.comm)


class _Head(nn.Module):
    """Hidden states [T, D] -> as the head that is cut."""

    def __init__(self, inner: nn.Module, comm: Comm) -> None:
        super().__init__()
        self.inner, self.comm = inner, comm

    def forward(self, hidden: Tensor, labels: Tensor, weights: Tensor) -> Any:
        return self.inner(_Own.apply(hidden, self.comm), labels, weights)


class _Gather(torch.autograd.Function):
    """[T', D] -> [T, D]; the gradient is whole on every rank, so each takes its rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_rows: int, comm: Comm) -> Tensor:
        ctx.comm = comm
        return gather_rows(x, num_rows, comm, "embedding whole forward")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[slice(*rows_of(grad.shape[0], ctx.comm))], None, None


class _Own(torch.autograd.Function):
    """[T, D] -> [T', D]; each rank's gradient is of its rows, and all need all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm) -> Tensor:
        ctx.comm, ctx.num_rows = comm, x.shape[0]
        return x[slice(*rows_of(x.shape[0], comm))]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gather_rows(grad, ctx.num_rows, ctx.comm, "head whole backward"), None
