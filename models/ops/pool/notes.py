"""Notes: what a pool holds, one row a token.

A row is `summary [W] | score | stamp`, in float32 at least. The stamp is the token's position in its document plus one, in two
digits of 2^20 so that float32 holds it exactly; a row of zeros is an empty slot. One tensor is one message between ranks.

Notes are ordered by a key: the score (`priority`) or the position (`fifo`). Of equal keys the earlier token comes first, so
the order is total: lists are put together in the order of time and sorted stably.

Legend: T tokens, W summary width, n = W + 3 numbers of a row, R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

POLICIES = ("priority", "fifo")
EXTRA = 3  # numbers of a row beside the summary
_DIGIT = 1 << 20


def make_notes(summary: Tensor, score: Tensor, positions: Tensor, noted: Tensor) -> Tensor:
    """Rows [T, n] of the tokens that are noted, and empty rows of the others.

    Args:
        summary: [T, W]. score: [T]. positions: in their documents, int64 [T]. noted: bool [T].
    """
    dtype = torch.promote_types(torch.float32, torch.promote_types(summary.dtype, score.dtype))
    stamp = positions + 1
    digits = torch.stack([stamp // _DIGIT, stamp % _DIGIT], dim=-1)
    rows = torch.cat([summary.to(dtype), score.to(dtype)[..., None], digits.to(dtype)], dim=-1)
    return torch.where(noted[..., None], rows, torch.zeros_like(rows))


def positions_of(notes: Tensor) -> Tensor:
    """[..., n] -> int64 [...]: positions, -1 where a slot is empty."""
    digits = notes.detach()[..., -2:].long()
    return digits[..., 0] * _DIGIT + digits[..., 1] - 1


def keys_of(notes: Tensor, policy: str) -> Tensor:
    """[..., n] -> float64 [...]: larger is kept, -inf where a slot is empty."""
    positions = positions_of(notes)
    keys = positions if policy == "fifo" else notes.detach()[..., -EXTRA]
    return keys.double().masked_fill(positions < 0, -torch.inf)


def best(index: Tensor, keys: Tensor, count: int) -> Tensor:
    """Of entries in the order of time, the `count` of largest key, largest first, earlier first among equals.

    Args:
        index, keys: [..., R], R >= count.

    Returns:
        [..., count] of `index`.
    """
    order = keys.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return index.gather(-1, order)
