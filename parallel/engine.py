"""How one sequence is spread over one group: layout, exchange and attention engine, chosen by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from longhaul.models.ops.attention import Mask
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import SequenceShard, WholeSequence

from .attention.registry import ENGINES, make_attention
from .comm import Comm, Ledger
from .exchange.registry import EXCHANGES, make_exchange
from .layout import SequenceLayout, check_recurrent, layout_kind
from .shard import RankShard, WholeShard

TWO_LEVELS = {"hierarchical", "usp"}  # engines that cannot do without groups inside and across nodes


class SequenceParallel:
    """The sequence-parallel engine of one group.

    Args:
        comm: the sequence group.
        exchange: how recurrent states travel, by name (`longhaul.parallel.exchange.registry`).
        attention: how softmax attention reaches other ranks, by name (`longhaul.parallel.attention.registry`).
        layout: how tokens are spread, by name (`longhaul.parallel.layout`).
        tensor: the ranks that hold the same tokens as this one, with other heads.
        levels: the ranks of this node, and the ranks with this one's index in their nodes; for two-level engines.
        exchange_options, attention_options, layout_options: of their own (slices, stripes).
    """

    def __init__(
        self,
        comm: Comm,
        exchange: str = "all_gather",
        attention: str = "all_gather",
        layout: str = "contiguous",
        *,
        tensor: Comm | None = None,
        levels: tuple[Comm, Comm] | None = None,
        exchange_options: Mapping[str, Any] | None = None,
        attention_options: Mapping[str, Any] | None = None,
        layout_options: Mapping[str, Any] | None = None,
    ) -> None:
        layout_kind(layout)
        self.tensor = tensor or Comm(None, comm.ledger)
        self.comm, self.layout_name, self.layout_options = comm, layout, dict(layout_options or {})
        inside = dict(zip(("intra", "inter"), levels or ()))
        options = {**_accepted(EXCHANGES.get(exchange), inside), **(exchange_options or {})}
        self.exchange = make_exchange(exchange, comm, **options)
        inside = dict(zip(("inner", "outer"), levels or ()))
        options = {**_accepted(ENGINES.get(attention), inside), **(attention_options or {})}
        self.attention = make_attention(attention, comm, **options)

    def check(self, recurrent: bool, masks: Iterable[Mask] = ()) -> None:
        """Refuse, before the first step and with a `UserError`, a model that these engines cannot serve.

        Args:
            recurrent: it has layers whose state goes along the sequence.
            masks: of its softmax attentions.
        """
        if self.comm.size == 1:
            return
        if recurrent:
            check_recurrent(self.layout_name)
            # Any stream shows what a layout looks like; this one has a document a rank.
            documents = Documents(range(0, 2 * self.comm.size + 1, 2))
            self.exchange.check(SequenceLayout.make(self.layout_name, documents, self.comm.size))
        for mask in masks:
            self.attention.check(mask)

    def prepare(self, device: torch.device) -> None:
        """Let the exchange measure what it chooses by, before the first step; on all ranks at once."""
        self.exchange.prepare(device)

    def describe(self) -> list[str]:
        """What the exchange measured, chose and gave up so far, line by line."""
        return self.exchange.describe().splitlines() if self.comm.size > 1 else []

    @property
    def ledger(self) -> Ledger:
        """What this rank received, by label."""
        return self.comm.ledger

    def layout(self, tokens: Documents | int) -> SequenceLayout:
        """Which tokens of a stream each rank holds: of these documents, or of this length if the layout asks no more."""
        if self.comm.size == 1:
            return SequenceLayout.contiguous(tokens.num_tokens if isinstance(tokens, Documents) else tokens, 1)
        return SequenceLayout.make(self.layout_name, tokens, self.comm.size, **self.layout_options)

    def local_tokens(self, tokens: Documents | int) -> tuple[tuple[int, int], ...]:
        """Global token ranges of this rank, in part order."""
        return self.layout(tokens).parts[self.comm.rank]

    def shard(
        self,
        documents: Documents,
        device: torch.device | str = "cpu",
        keep_state: bool = False,
        layout: SequenceLayout | None = None,
    ) -> SequenceShard:
        """This rank's part of a stream, spread as `layout` says, or by the engine's own."""
        if self.comm.size == 1 and self.tensor.size == 1:
            return WholeSequence(documents, device, keep_state)
        if self.comm.size == 1:
            return WholeShard(documents, self.tensor, device, keep_state)
        layout = layout or self.layout(documents)
        return RankShard(layout, documents, self.comm, self.exchange, self.attention, device, keep_state, self.tensor)


def _accepted(factory: Callable[..., Any] | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `options` that a factory takes: only two-level engines ask for groups inside and across nodes."""
    known = inspect.signature(factory).parameters if factory is not None else {}
    return {name: value for name, value in options.items() if name in known}
