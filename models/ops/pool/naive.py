"""The oracle: pools as lists, filled note by note as a block closes, and read token by token.

Legend: T tokens, K slots, W summary width, n = W + 3 numbers of a note.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..segments import Documents
from .notes import EXTRA, positions_of


def insert(pool: list[Tensor], note: Tensor, slots: int, policy: str) -> None:
    """Put a note into a bounded pool that is kept in the order of time."""
    if len(pool) == slots:
        if policy == "fifo":
            pool.pop(0)
        else:
            scores = [float(each.detach()[-EXTRA]) for each in pool]
            if float(note.detach()[-EXTRA]) <= min(scores):
                return  # an equal score does not push out an earlier token
            pool.pop(len(scores) - 1 - scores[::-1].index(min(scores)))
    pool.append(note)


def naive_pool(
    q: Tensor, notes: Tensor, documents: Documents, size: int, slots: int, policy: str, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What each token reads, and the pools after the stream.

    Args:
        q: [T, W]. notes: [T, n], rows of zeros for tokens that are not noted.
        state: sealed and open notes before the stream, [2, K, n].

    Returns:
        [T, W], and sealed and open notes of the last document, [2, K, n], the best first.
    """
    sealed: list[Tensor] = []
    opened: list[Tensor] = []
    if state is not None and documents.first_position:
        sealed, opened = ([row for row in half if positions_of(row) >= 0] for half in state)
        sealed.sort(key=lambda row: int(positions_of(row)))
    outputs = []
    for token in range(documents.num_tokens):
        position = documents.position(token)
        if position == 0:
            sealed, opened = [], []
        own = [note for note in opened if int(positions_of(note)) // size == position // size]
        pool = list(sealed)
        if not own:
            for note in sorted(opened, key=lambda row: int(positions_of(row))):
                insert(pool, note, slots, policy)
        summaries = torch.stack([q.new_zeros(q.shape[1]), *(note[:-EXTRA].to(q.dtype) for note in pool)])
        weights = (summaries @ q[token] * q.shape[1] ** -0.5).softmax(0)
        outputs.append(weights @ summaries)
        if positions_of(notes[token]) >= 0:
            if not own:
                sealed, opened = pool, []
            insert(opened, notes[token], slots, policy)
    out = torch.stack(outputs) if outputs else q
    return out, torch.stack([_rows(half, slots, policy, notes) for half in (sealed, opened)])


def _rows(pool: list[Tensor], slots: int, policy: str, like: Tensor) -> Tensor:
    def order(row: Tensor) -> tuple[float, int]:
        position = int(positions_of(row))
        return -position if policy == "fifo" else -float(row.detach()[-EXTRA]), position

    empty = [like.new_zeros(like.shape[1])] * (slots - len(pool))
    return torch.stack([*sorted(pool, key=order), *empty])
