"""Which streams a process reads in a step, and which tokens of them it holds.

Letters: `T` tokens held here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import SequenceShard
from longhaul.parallel.engine import SequenceParallel

from .data import Stream


class Batch:
    """One stream's tokens held here."""

    def __init__(self, tokens: Tensor, labels: Tensor, weights: Tensor, shard: SequenceShard) -> None:
        self.tokens, self.labels, self.weights = tokens, labels, weights
        """[T] each."""
        self.shard = shard


def stream_indices(consumed: int, global_batch_size: int, data_rank: int, data_size: int) -> list[int]:
    """Samples that one data-parallel group reads in a step, in micro-batch order.

    The step takes samples `consumed .. consumed + global_batch_size`, whatever the topology; micro-batch `m` of group
    `d` is the `m * data_size + d`-th of them.
    """
    return list(range(consumed + data_rank, consumed + global_batch_size, data_size))


def place(stream: Stream, engine: SequenceParallel, device: torch.device, keep_state: bool = False) -> Batch:
    """Cut a stream to the tokens held here and move them to the device."""
    documents = Documents(stream.bounds, stream.first_position)
    ranges = engine.local_tokens(documents)

    def local(values: Tensor) -> Tensor:
        return torch.cat([values[start:stop] for start, stop in ranges]).to(device)

    shard = engine.shard(documents, device, keep_state)
    return Batch(local(stream.tokens), local(stream.labels), local(stream.weights), shard)
