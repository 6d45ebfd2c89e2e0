"""How one sequence is spread over one group: layout, exchange and attention engine, chosen by name."""

from __future__ import annotations

import torch

from longhaul.models.errors import UserError
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import SequenceShard, WholeSequence

from .attention.registry import make_attention
from .comm import Comm, Ledger
from .exchange.registry import make_exchange
from .layout import SequenceLayout
from .shard import RankShard

LAYOUTS = ("contiguous",)


class SequenceParallel:
    """The sequence-parallel engine of one group.

    Args:
        comm: the sequence group.
        exchange: how recurrent states travel, by name (`longhaul.parallel.exchange.registry`).
        attention: how softmax attention reaches other ranks, by name (`longhaul.parallel.attention.registry`).
        layout: how tokens are spread, by name.
    """

    def __init__(
        self, comm: Comm, exchange: str = "all_gather", attention: str = "all_gather", layout: str = "contiguous"
    ) -> None:
        if layout not in LAYOUTS:
            raise UserError(f"parallel.layout {layout!r} is none of {', '.join(LAYOUTS)}.")
        self.comm, self.layout_name = comm, layout
        self.exchange = make_exchange(exchange, comm)
        self.attention = make_attention(attention, comm)

    @property
    def ledger(self) -> Ledger:
        """What this rank received, by label."""
        return self.comm.ledger

    def layout(self, num_tokens: int) -> SequenceLayout:
        """Which tokens of a stream each rank holds."""
        return SequenceLayout.contiguous(num_tokens, self.comm.size)

    def local_tokens(self, num_tokens: int) -> tuple[tuple[int, int], ...]:
        """Global token ranges of this rank, in part order."""
        return self.layout(num_tokens).parts[self.comm.rank]

    def shard(
        self, documents: Documents, device: torch.device | str = "cpu", keep_state: bool = False
    ) -> SequenceShard:
        """This rank's part of a stream."""
        if self.comm.size == 1:
            return WholeSequence(documents, device, keep_state)
        layout = self.layout(documents.num_tokens)
        return RankShard(layout, documents, self.comm, self.exchange, self.attention, device, keep_state)
