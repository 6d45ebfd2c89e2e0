"""Two levels: one exchange inside a node, another across nodes.

Nodes are consecutive ranks. Inside a node, a prefix of *maps* and the node's total; across nodes, a prefix of totals, in
which each rank of a node takes a slice of the value axis to its peers of the same index, so that a node's links share one
state between them; then the slices are gathered inside the node, and every rank applies what comes before it there.

Legend: P ranks, g ranks of a node, V value width.
"""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from longhaul.models.errors import UserError
from longhaul.models.ops.affine import AffineMap
from longhaul.models.ops.chain import Link
from longhaul.models.ops.recurrence import Pending
from longhaul.parallel.comm import Comm
from longhaul.parallel.layout import SequenceLayout

from .base import Chain, Exchange, crosses, label
from .runs import Window, make_runs, pass_through
from .walk import Walk


class PendingWindows(Protocol):
    """A prefix of maps under way."""

    def wait(self) -> tuple[Window | None, Window | None]: ...


@runtime_checkable
class Composing(Protocol):
    """An exchange that can give the prefix as maps, before anyone knows what enters the chain."""

    comm: Comm

    def start_windows(self, maps: AffineMap, chain: Chain, reverse: bool) -> PendingWindows: ...


class Hierarchical(Exchange):
    """One exchange inside a node, another across nodes; one part a rank, in rank order.

    Received by a rank, each way: what `inside` receives for the prefix of the node's maps (`all_gather`: g - 1 packed maps;
    `log_scan`: at most ceil(log2 g), and one for the total); what `across` receives on a chain of P / g nodes for maps
    of ceil or floor(V / g) values; and, where a document goes on between nodes or a state enters or leaves the
    chain, g - 1 slices of one state (two, if the end is wanted), each padded to ceil(V / g) values. Nothing if no
    document goes on from one rank into another, unless the end is wanted.

    Args:
        comm: the sequence group.
        inside: an exchange that composes maps, on the ranks of this node.
        across: any exchange, on the ranks that have this one's index in their nodes.
    """

    name = "hierarchical"

    def __init__(self, comm: Comm, inside: Exchange, across: Exchange) -> None:
        if not isinstance(inside, Composing):
            raise UserError(
                f"Exchange {getattr(inside, 'name', inside)!r} passes states, not maps, and cannot work inside a node; "
                "use 'all_gather' or 'log_scan' there."
            )
        nodes, size = across.comm.size, inside.comm.size
        if nodes * size != comm.size or across.comm.rank * size + inside.comm.rank != comm.rank:
            raise UserError(
                f"A hierarchical exchange needs nodes of consecutive ranks, but {nodes} nodes of {size} ranks do not "
                f"make rank {comm.rank} of {comm.size} out of rank {inside.comm.rank} of node {across.comm.rank}."
            )
        self.comm, self.inside, self.across = comm, inside, across

    def check(self, layout: SequenceLayout) -> None:
        if layout.num_parts != 1 or [rank for rank, _ in layout.order] != sorted(rank for rank, _ in layout.order):
            raise UserError(
                f"Exchange 'hierarchical' serves one part a rank in rank order, not layout {layout.name!r}; use the "
                "contiguous layout, or one of 'ring', 'all_scan', 'log_scan' and 'all_gather'."
            )

    def start(
        self,
        maps: AffineMap,
        chain: Chain,
        initial: Tensor | None = None,
        reverse: bool = False,
        want_end: bool = False,
    ) -> Pending:
        owners = [link.owner for link in chain]
        if owners != list(range(self.comm.size)):
            raise UserError(f"Exchange 'hierarchical' serves one part a rank in rank order, not parts of ranks {owners}.")
        if not crosses(chain) and not want_end:
            return Walk(self.comm).start(maps, chain, initial, reverse)  # which sends nothing
        return _TwoLevels(self, maps, chain, initial, reverse, want_end)


class _TwoLevels:
    def __init__(
        self,
        exchange: Hierarchical,
        maps: AffineMap,
        chain: Chain,
        initial: Tensor | None,
        reverse: bool,
        want_end: bool,
    ) -> None:
        self.exchange, self.maps, self.reverse, self.want_end = exchange, maps, reverse, want_end
        self.initial = initial
        inside, across = exchange.inside.comm, exchange.across.comm
        size = inside.size
        nodes = [chain[start : start + size] for start in range(0, len(chain), size)]
        self.nodes = [_node_link(k, links) for k, links in enumerate(nodes)]
        own = nodes[across.rank]
        # The node's own end is not the chain's: from the right, what enters it is what goes on into the next node.
        self.links = [link._replace(owner=k) for k, link in enumerate(own)]
        self.run = next((run for run in make_runs(self.links, reverse) if run.owner == inside.rank), None)
        assert isinstance(exchange.inside, Composing)
        self.prefix = exchange.inside.start_windows(maps, self.links, reverse)

    def wait(self) -> tuple[Tensor, Tensor | None]:
        before, total = self.prefix.wait()
        inside, across = self.exchange.inside.comm, self.exchange.across
        size, rank = inside.size, inside.rank
        # An empty node's map is never read: this rank's own stands in for it.
        whole = self.maps if total is None else total.maps
        initial = None if self.initial is None else self.initial.tensor_split(size, dim=-1)[rank]
        slice_ = whole.split(size)[rank]
        pending = across.start(slice_, self.nodes, initial, self.reverse, self.want_end)
        entering_slice, end_slice = pending.wait()
        state, end = self._gather(entering_slice[0], end_slice if self.want_end else None)
        entering = torch.zeros_like(self.maps.offset)
        if self.run is not None:
            pass_through(self.maps, self.run, state if before is None else before.apply(state), entering)
        return entering, end

    def _gather(self, state: Tensor, end: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The whole state that enters the node, and what leaves the chain, from the slices of this node's ranks."""
        inside, width = self.exchange.inside.comm, self.maps.offset.shape[-1]
        runs = make_runs(self.nodes, self.reverse)
        own = next((k for k, run in enumerate(runs) if run.owner == self.exchange.across.comm.rank), None)
        enters = own is not None and runs[own].reads and (own > 0 or self.initial is not None)
        if not enters and end is None:
            return torch.zeros_like(self.maps.offset[0]), None
        stacked = torch.stack([state, torch.zeros_like(state) if end is None else end][: 1 if end is None else 2])
        padded = torch.nn.functional.pad(stacked, (0, math.ceil(width / inside.size) - state.shape[-1]))
        slices = inside.all_gather(torch.view_as_real(padded) if padded.is_complex() else padded, label(self.reverse))
        gathered = slices.wait()  # [g, 1 or 2, *state, ceil(V / g)]
        if padded.is_complex():
            gathered = torch.view_as_complex(gathered)
        widths = [piece.shape[-1] for piece in self.maps.offset.tensor_split(inside.size, dim=-1)]
        joined = torch.cat([piece[..., :w] for piece, w in zip(gathered, widths)], dim=-1)
        return joined[0], None if end is None else joined[1]


def _node_link(node: int, links: Chain) -> Link:
    """The part of the stream that a node holds, as one link of the chain of nodes."""
    full = [link for link in links if link.length]
    tail = 0
    for link in reversed(full):
        tail += link.tail
        if link.cut:
            break
    return Link(
        owner=node,
        slot=0,
        length=sum(link.length for link in full),
        tail=tail,
        cut=any(link.cut for link in full),
        enters=not full or full[0].enters,
    )
