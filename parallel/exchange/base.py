"""What an exchange is: an exclusive prefix of affine maps over the parts of a sequence, wherever they lie.

An exchange knows ranks, messages and when to post them. It never asks which mixer a map came from, nor what kind of map it
is: it packs, sends, unpacks, composes and applies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from longhaul.models.ops.affine import AffineMap
from longhaul.models.ops.chain import Link
from longhaul.models.ops.recurrence import Pending
from longhaul.parallel.comm import Comm

Chain = Sequence[Link]


class Exchange(Protocol):
    """An exclusive prefix over the chain, forward or (with adjoint maps and `reverse`) from the right."""

    comm: Comm

    def start(
        self,
        maps: AffineMap,
        chain: Chain,
        initial: Tensor | None = None,
        reverse: bool = False,
        want_end: bool = False,
    ) -> Pending:
        """Post what can be posted; `wait` on the result gives what enters each own part and what leaves the chain.

        Args:
            maps: the maps of the parts held here, one per slot, [N, *state_shape].
            chain: all parts of the sequence, in order.
            initial: what enters the chain (from the right, with `reverse`), replicated; None is zero.
            want_end: whether every rank wants what leaves the chain.
        """
        ...


def own_links(chain: Chain, rank: int) -> list[int]:
    """Where in the chain the parts of `rank` stand, by slot."""
    return [k for _, k in sorted((link.slot, k) for k, link in enumerate(chain) if link.owner == rank)]


def label(reverse: bool) -> str:
    """The name under which state traffic is counted."""
    return "state backward" if reverse else "state forward"


def crosses(chain: Chain) -> bool:
    """Whether any document goes on from one part into a later one."""
    return any(link.enters and link.length for link in chain[1:])
