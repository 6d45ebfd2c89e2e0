"""Attention of tokens to the pools of their cells.

Keys and values are the summaries themselves. Beside a pool's notes there is always one slot of logit 0 and value 0: a token
may take nothing, and an empty pool gives zero.

Legend: T tokens, M cells, R slots, W summary width, Q tiles, C tokens of a tile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .cells import Cells
from .notes import EXTRA, positions_of


def read(q: Tensor, pools: Tensor, cells: Cells) -> Tensor:
    """What queries find in their cell's pool.

    Args:
        q: [T, W].
        pools: [M, R, W + 3].

    Returns:
        [T, W].
    """
    present = (positions_of(pools) >= 0)[cells.cell_of_tile]  # [Q, R]
    summaries = pools[..., :-EXTRA].to(q.dtype)[cells.cell_of_tile]  # [M, R, W] -> [Q, R, W]
    tiles = torch.cat([q, q.new_zeros(1, q.shape[1])])[cells.token_of]  # [T, W] -> [Q, C, W]
    scores = (tiles @ summaries.mT) * q.shape[1] ** -0.5
    scores = scores.masked_fill(~present[:, None], -torch.inf)
    weights = F.pad(scores, (0, 1)).softmax(-1)[..., :-1]  # the slot of logit 0
    return (weights @ summaries).flatten(0, 1)[cells.slot_of]
