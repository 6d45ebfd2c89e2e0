"""Cross-entropy of a linear head, chunk by chunk over tokens: the logits of a few tokens are all that ever exists.

The loss is a scalar, so its gradient is known up to one factor when it is computed: a training forward also takes the
gradients of hidden and weight (three matmuls in all, nothing recomputed), and the backward only multiplies.

Legend: T tokens, C tokens of a chunk, D model width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

MAX_LOGITS_BYTES = 64 << 20  # of one chunk


def default_chunk(vocabulary: int, dtype: torch.dtype) -> int:
    return max(1, MAX_LOGITS_BYTES // (max(vocabulary, 1) * dtype.itemsize))


def matmul_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the matmuls: autocast's where it is on, except for float64."""
    device = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, chunk: int | None
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(torch.float32, hidden.dtype)
        need_hidden, need_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        weights = weights.to(dtype)
        loss = torch.zeros((), dtype=dtype, device=hidden.device)
        dhidden = torch.zeros_like(hidden) if need_hidden else None
        dweight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if need_weight else None
        matrix = weight.to(matmul_dtype(hidden))
        step = chunk or default_chunk(weight.shape[0], dtype)
        # Tokens of weight zero are left out, not multiplied by zero: their labels and states may be anything.
        kept = weights.nonzero().squeeze(1)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in kept.split(step) if kept.numel() else ():
                states = hidden[rows].to(matrix.dtype)  # [C, D]
                dlogits = _chunk(states, matrix, labels[rows], weights[rows], dtype, loss, need_hidden or need_weight)
                if dlogits is None:
                    continue
                if dhidden is not None:
                    dhidden[rows] = (dlogits @ matrix).to(dhidden.dtype)
                if dweight is not None:
                    if dlogits.dtype == dtype:
                        dweight.addmm_(dlogits.T, states)
                    else:
                        dweight += dlogits.T @ states
        ctx.save_for_backward(dhidden, dweight)  # type: ignore[arg-type]
        ctx.weight_dtype = weight.dtype  # type: ignore[attr-defined]
        weight_sum = weights.sum()
        ctx.mark_non_differentiable(weight_sum)
        return loss, weight_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors  # type: ignore[attr-defined]
        if dhidden is not None:
            dhidden = (dhidden * dloss).to(dhidden.dtype)
        if dweight is not None:
            dweight = (dweight * dloss).to(ctx.weight_dtype)  # type: ignore[attr-defined]
        return dhidden, dweight, None, None, None


def _chunk(
    states: Tensor,
    matrix: Tensor,
    labels: Tensor,
    weights: Tensor,
    dtype: torch.dtype,
    loss: Tensor,
    need_grad: bool,
) -> Tensor | None:
    """Add the loss of states [C, D] to `loss` [], in place; return the gradient of their logits [C, V], if needed."""
    logits = (states @ matrix.T).to(dtype)  # [C, V]
    picked = logits.gather(1, labels[:, None]).squeeze(1)
    top = logits.amax(dim=1, keepdim=True)
    total = logits.sub_(top).exp_().sum(dim=1, keepdim=True)
    lse = (total.log() + top).squeeze(1)
    loss += torch.dot(weights, lse - picked)
    if not need_grad:
        return None
    dlogits = logits.mul_(weights[:, None] / total)
    dlogits.scatter_add_(1, labels[:, None], -weights[:, None])
    return dlogits.to(matrix.dtype)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Weighted sum over tokens of the cross-entropy of `hidden weight^T`.

    Matmuls run in the dtype of `hidden`, or autocast's; softmax, loss and the gradient of `weight` are accumulated in
    at least float32. Gradients reach `hidden` and `weight`.

    Args:
        hidden: [T, D]. weight: [V, D], the head.
        labels: int64 [T]. weights: [T]; a token of weight zero is ignored, whatever its label and state.
        chunk: tokens whose logits exist at once; chosen so that these take at most 64 MiB if left out.

    Returns:
        loss_sum [], weight_sum [], in at least float32.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, weights, chunk)
