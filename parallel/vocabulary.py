"""Embedding and head of which each rank of a tensor group owns some rows.

Letters: t ranks, V vocabulary, T tokens of the sequence rank, T' = T/t tokens this rank answers for, D model width, C tokens
of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from longhaul.models.ops import recompute
from longhaul.models.ops.cross_entropy.chunk import default_chunk, matmul_dtype

from .comm import Comm
from .functional import gather_rows, rows_of, scatter_sum


class VocabularyParallelEmbedding(nn.Module):
    """Tokens [T] -> rows [T', D]; `weight` [V/t, D] are rows `first` and following."""

    def __init__(self, weight: nn.Parameter, first: int, comm: Comm) -> None:
        super().__init__()
        self.weight, self.first, self.comm = weight, first, comm

    def forward(self, tokens: Tensor) -> Tensor:
        own = tokens - self.first
        elsewhere = (own < 0) | (own >= len(self.weight))
        rows = F.embedding(own.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere[:, None], 0)
        return scatter_sum(rows, self.comm, "embedding")


class VocabularyParallelHead(nn.Module):
    """Cross-entropy with a head of which `weight` [V/t, D] are rows `first` and following."""

    def __init__(self, weight: nn.Parameter, first: int, comm: Comm) -> None:
        super().__init__()
        self.weight, self.first, self.comm = weight, first, comm

    def forward(self, hidden: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the tokens answered for here; hidden [T', D], labels int64 [T], weights [T]."""
        whole = gather_rows(hidden, len(labels), self.comm, "head")
        return _CrossEntropy.apply(whole, self.weight, labels, weights, self.first, self.comm)

    def logits(self, hidden: Tensor) -> Tensor:
        """This rank's logits, [n, D] -> [n, V/t]."""
        return F.linear(hidden, self.weight.to(hidden.dtype))


class _CrossEntropy(torch.autograd.Function):
    """Two passes over chunks of tokens: log-sum-exps and the labels' logits, which cross in one message; then gradients.

    Both factors of the loss's cotangent must be the same on all ranks, as those of one scaled loss are: gradients are
    computed with the forward, and the backward multiplies them.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, first: int, comm: Comm
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(torch.float32, hidden.dtype)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        weights = weights.to(dtype)
        matrix = weight.to(matmul_dtype(hidden))
        step = default_chunk(weight.shape[0], dtype)
        kept = weights.nonzero().squeeze(1)
        own = labels[kept] - first
        here = (own >= 0) & (own < weight.shape[0])
        own = own.masked_fill(~here, 0)
        chunks = list(zip(kept.split(step), own.split(step), here.split(step))) if kept.numel() else []
        dhidden = torch.zeros_like(hidden) if need_hidden else None
        dweight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if need_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            statistics = hidden.new_zeros(2, len(kept), dtype=dtype)  # own log-sum-exp, own label's logit
            start = 0
            for rows, label, mine in chunks:
                logits = (hidden[rows].to(matrix.dtype) @ matrix.T).to(dtype)  # [C, V/t]
                stop = start + len(rows)
                statistics[0, start:stop] = logits.logsumexp(1)
                statistics[1, start:stop] = logits.gather(1, label[:, None]).squeeze(1) * mine
                start = stop
            gathered = recompute.keep(lambda: comm.all_gather(statistics, "head forward").wait())  # [t, 2, T]
            total, picked = gathered[:, 0].logsumexp(0), gathered[:, 1].sum(0)
            for (rows, label, mine), lse in zip(chunks, total.split(step)) if need_hidden or need_weight else ():
                states = hidden[rows].to(matrix.dtype)
                dlogits = ((states @ matrix.T).to(dtype) - lse[:, None]).exp_()
                dlogits.scatter_add_(1, label[:, None], -mine[:, None].to(dtype))
                dlogits = dlogits.mul_(weights[rows, None]).to(matrix.dtype)
                if dhidden is not None:
                    dhidden[rows] = (dlogits @ matrix).to(dhidden.dtype)
                if dweight is not None:
                    dweight += dlogits.T @ states
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        low, high = rows_of(len(labels), comm)
        ours = (kept >= low) & (kept < high)
        loss = torch.dot(weights[kept] * ours, total - picked)
        weight_sum = weights[low:high].sum()
        ctx.mark_non_differentiable(weight_sum)
        return loss, weight_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        if dhidden is not None:
            dhidden = (dhidden * dloss).to(dhidden.dtype)
        if dweight is not None:
            dweight = (dweight * dloss).to(ctx.weight_dtype)
        return dhidden, dweight, None, None, None, None
