"""How much memory a model keeps of what it has read, to go on from it one token at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .ops.segments import Documents
from .sequence import WholeSequence


def tensor_bytes(state: Any) -> int:
    """Bytes of the tensors of a state, a pytree."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(state) if isinstance(leaf, Tensor))


@torch.no_grad()
def state_bytes(mixer: nn.Module, hidden_size: int, context: int) -> int:
    """Bytes that a mixer keeps after `context` tokens of a document, in the type of its parameters.

    A recurrent state has one size from the first token on, so that one token tells it. Softmax attention keeps keys and values
    of every token that a later one may see.

    Args:
        mixer: a registered mixer, whole in this process.
        context: at least 1.
    """
    like = next(mixer.parameters())
    shard = WholeSequence(Documents((0, 1)), like.device, keep_state=True)
    training = mixer.training
    _, state = mixer.eval()(like.new_zeros(1, hidden_size), shard)
    mixer.train(training)
    mask: Any = getattr(mixer, "mask", None)
    if mask is None:
        return tensor_bytes(state)
    kept = context if mask.window is None else min(context, mask.window - 1)
    # A window of one token keeps none, and one token's state cannot tell what a token costs.
    attention: Any = mixer
    return int(kept * 2 * attention.num_kv_heads * attention.head_dim * like.element_size())
