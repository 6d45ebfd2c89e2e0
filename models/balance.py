"""Statistics of a router, per document: what balance losses are made of, so that packing and topology do not matter."""

from __future__ import annotations

import torch
from torch import Tensor

from .sequence import SequenceShard


def routing_means(
    probabilities: Tensor, chosen: Tensor, shard: SequenceShard, extra: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Means over each document of the stream, wherever its tokens are held, [documents, ...] each.

    Args:
        probabilities: of the router, [T, E]. chosen: int64 [T, k]. extra: [T, n], averaged along.

    Returns:
        f, how often each choice was taken [documents, E] (it sums to k), P, its mean probability, and the mean of `extra`.
    """
    counts = torch.zeros_like(probabilities).scatter(1, chosen, 1.0)
    columns = [counts, probabilities] + ([] if extra is None else [extra])
    totals = shard.total(torch.cat(columns, dim=1), per="document")  # [T, 2 E + n] -> [documents, 2 E + n]
    lengths = shard.document_lengths.to(totals)[:, None]
    return (totals / lengths).split([column.shape[1] for column in columns], dim=1)
