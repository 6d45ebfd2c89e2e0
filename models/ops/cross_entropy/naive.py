"""The oracle: all logits at once, differentiable by autograd. Legend: T tokens, D model width, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of `weights[t] * -log softmax(hidden[t] weight^T)[labels[t]]`, and the sum of the weights.

    Args:
        hidden: [T, D]. weight: [V, D]. labels: int64 [T]. weights: [T]; a token of weight zero is not there.
    """
    total = (hidden.sum() + weight.sum()) * 0  # a graph even without tokens
    for state, label, share in zip(hidden, labels.tolist(), weights.tolist()):
        if share != 0:
            logits = weight @ state  # [V]
            total = total + share * (torch.logsumexp(logits, 0) - logits[label])
    return total, weights.to(total.dtype).sum()
