"""The door over ranks: `SequenceShard` for the part of a stream that one rank of a sequence group holds.

Legend: T tokens held here, N parts held here, P ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from longhaul.models.ops.affine import AffineMap
from longhaul.models.ops.attention import Mask
from longhaul.models.ops.chain import Link
from longhaul.models.ops.recurrence import Pending, Recurrence, scan
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import Element, KVState, Monoid, SequenceShard, WholeSequence, token_sums

from .comm import Comm
from .exchange.base import Exchange
from .functional import all_sum, gather_rows, gathered_fold, join, rows_of, scatter_sum
from .layout import SequenceLayout


class AttentionEngine(Protocol):
    """Softmax attention over a sharded sequence."""

    def attend(
        self, shard: RankShard, q: Tensor, k: Tensor, v: Tensor, mask: Mask, state: KVState | None, scale: float
    ) -> tuple[Tensor, KVState | None]: ...


class OwnedHeads(SequenceShard):
    """The part of the door between owners of heads: the ranks of a tensor group, which hold the same tokens in a layer."""

    tensor: Comm

    def share(self, x: Tensor) -> Tensor:
        start, stop = rows_of(x.shape[0], self.tensor)
        return x[start:stop]

    def to_heads(self, x: Tensor) -> Tensor:
        return gather_rows(x, self.num_tokens, self.tensor, "to heads")

    def from_heads(self, x: Tensor) -> Tensor:
        return scatter_sum(x, self.tensor, "from heads")

    def head_sum(self, x: Tensor) -> Tensor:
        return x if self.tensor.size == 1 else all_sum(x, self.tensor, "head sum")


class WholeShard(OwnedHeads, WholeSequence):
    """The whole stream on each rank of a tensor group."""

    def __init__(
        self, documents: Documents, tensor: Comm, device: torch.device | str = "cpu", keep_state: bool = False
    ) -> None:
        super().__init__(documents, device, keep_state)
        self.tensor = tensor


class RankShard(OwnedHeads):
    """One rank's part of a stream.

    Args:
        layout: which tokens each rank holds.
        documents: the documents of the whole stream.
        comm: the sequence group (its rank says which part is ours).
        exchange: how recurrent states travel.
        attention: how softmax attention reaches the other ranks.
        keep_state: the stream goes on after this one.
        tensor: the ranks that hold the same tokens, with other heads.
    """

    def __init__(
        self,
        layout: SequenceLayout,
        documents: Documents,
        comm: Comm,
        exchange: Exchange,
        attention: AttentionEngine,
        device: torch.device | str = "cpu",
        keep_state: bool = False,
        tensor: Comm | None = None,
    ) -> None:
        super().__init__(layout.segments(comm.rank, documents), device, keep_state)
        self.tensor = tensor or Comm(None)
        self.layout, self.comm = layout, comm
        self.exchange, self.attention = exchange, attention
        self.chain = layout.chain(documents)

    def scan(self, op: Recurrence, x: Sequence[Tensor | None], state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        carry = _Carry(self.exchange, self.chain)
        return scan(op, join(x), self.segments, carry, initial=state, want_end=self.keep_state)

    def halo(self, x: Tensor, width: int, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        # The last `width` tokens of a concatenation, an associative merge; how many each part gives is known to all.
        bounds = self.segments.part_bounds
        tails = torch.stack([_last(x[start:stop], width) for start, stop in zip(bounds, bounds[1:])])

        def combine(earlier: Tensor, later: Tensor, link: Link) -> Tensor:
            count = min(width, link.length)
            return torch.cat([earlier[count:], later[width - count :]])

        def alone(own: Tensor, link: Link) -> Tensor:
            return torch.cat([torch.zeros_like(own[: max(0, width - link.tail)]), own[max(0, width - link.tail) :]])

        initial = None if state is None else (state,)
        before, after = self._prefix(
            (tails,),
            initial,
            "halo",
            lambda earlier, later, link: (combine(earlier[0], later[0], link),),
            lambda own, link: (alone(own[0], link),),
            lambda like: (torch.zeros_like(like[0]),),
        )
        return before[0], None if after is None else after[0]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask = Mask(), state: KVState | None = None, scale: float | None = None
    ) -> tuple[Tensor, KVState | None]:
        scale = scale if scale is not None else q.shape[-1] ** -0.5
        return self.attention.attend(self, q, k, v, mask, state, scale)

    def prefix(self, monoid: Monoid, element: Element, state: Element | None = None) -> tuple[Element, Element | None]:
        single = isinstance(element, Tensor)

        def unwrap(parts: tuple[Tensor, ...]) -> Element:
            return parts[0] if single else _like(element, parts)

        def wrap(value: Element) -> tuple[Tensor, ...]:
            return (value,) if single else tuple(value)

        before, after = self._prefix(
            wrap(element),
            None if state is None else wrap(state),
            "prefix",
            lambda earlier, later, link: wrap(monoid.combine(unwrap(earlier), unwrap(later))),
            lambda own, link: own,
            lambda like: wrap(monoid.empty(unwrap(like))),
        )
        return unwrap(before), None if after is None else unwrap(after)

    def total(self, x: Tensor, per: str = "sequence") -> Tensor:
        local = token_sums(x, per, self.document_ids, self.documents.num_documents)
        return all_sum(local, self.comm, "total")

    def document_sum(self, x: Tensor) -> Tensor:
        # Only documents that cross ranks travel: they come first in the table of sums, on every rank the same ones.
        def tables() -> tuple[int, int, Tensor]:
            slots = {document: slot for slot, document in enumerate(self.layout.crossing(self.documents))}
            crossing = len(slots)
            index = [slots.setdefault(document, len(slots)) for document in self.segments.document_of]
            return crossing, len(slots), torch.tensor(index, dtype=torch.int64, device=x.device)

        crossing, count, index = self.segments.cached(("document_sum", str(x.device)), tables)
        sums = x.new_zeros(count, *x.shape[1:]).index_add(0, index, x)
        if crossing:
            sums = torch.cat([all_sum(sums[:crossing], self.comm, "document sum"), sums[crossing:]])
        return sums[index]

    def _prefix(
        self,
        element: tuple[Tensor, ...],
        state: tuple[Tensor, ...] | None,
        label: str,
        combine: Callable[[tuple[Tensor, ...], tuple[Tensor, ...], Link], tuple[Tensor, ...]],
        alone: Callable[[tuple[Tensor, ...], Link], tuple[Tensor, ...]],
        empty: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]],
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
        """Gather the parts' elements [N, ...] and fold them traceably in chain order.

        `alone` is what a part that is cut leaves behind, `combine` what a part adds to what came before it.
        """

        def fold(gathered: tuple[Tensor, ...], state: tuple[Tensor, ...] | None) -> tuple[tuple[Tensor, ...], ...]:
            zero = empty(tuple(tensor[0, 0] for tensor in gathered))
            running = zero if state is None else state
            before: dict[int, tuple[Tensor, ...]] = {}
            for link in self.chain:
                if link.owner == self.comm.rank:
                    before[link.slot] = running if link.enters else zero
                own = tuple(tensor[link.owner, link.slot] for tensor in gathered)
                if link.length:
                    running = alone(own, link) if link.cut else combine(running, own, link)
            stacked = tuple(torch.stack(parts) for parts in zip(*(before[slot] for slot in sorted(before))))
            return stacked, running if self.keep_state else ()

        before, after = gathered_fold(element, state, fold, self.comm, label)
        return before, after if self.keep_state else None


class _Carry:
    """An exchange bound to the chain of one stream."""

    def __init__(self, exchange: Exchange, chain: Sequence[Link]) -> None:
        self.exchange, self.chain = exchange, chain

    def start(self, maps: AffineMap, initial: Tensor | None, reverse: bool, want_end: bool) -> Pending:
        return self.exchange.start(maps, self.chain, initial, reverse, want_end)

    def mark(self, event: str) -> None:
        self.exchange.comm.ledger.mark(event)


def _like(element: Element, parts: Sequence[Tensor]) -> Element:
    return type(element)(*parts) if hasattr(element, "_fields") else tuple(parts)


def _last(x: Tensor, width: int) -> Tensor:
    """The last `width` rows of [T, ...], zeros in front if there are fewer."""
    missing = width - x.shape[0]
    if missing <= 0:
        return x[x.shape[0] - width :]
    return torch.cat([x.new_zeros(missing, *x.shape[1:]), x])
