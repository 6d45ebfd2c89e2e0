"""What an exchange is: an exclusive prefix of affine maps over the parts of a sequence, wherever they lie.

An exchange knows ranks, messages and when to post them. It never asks which mixer a map came from, nor what kind of map it
is: it packs, sends, unpacks, composes and applies.

Several exchanges may be under way on one group, if all ranks start them in one order and wait for them in that order
(not with `ring_blocking`, whose `start` waits for other ranks).
Each has tags of its own (`Comm.next_tag`), which keep point-to-point messages apart where the backend has tags (gloo), and
there goes on beside the local work (`courier.py`).
NCCL has none: there, wait for a point-to-point exchange of several parts a rank before the next one starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from longhaul.models.errors import UserError
from longhaul.models.ops.affine import AffineMap
from longhaul.models.ops.chain import Link
from longhaul.models.ops.recurrence import Pending
from longhaul.parallel.comm import Comm
from longhaul.parallel.layout import SequenceLayout

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

        A part without tokens reads nothing, so what `wait` gives for it is unspecified (but finite).

        Args:
            maps: the maps of the parts held here, one per slot, [N, *state_shape]; with `reverse` adjoint ones, whose
                cotangent C is zero for a part that nothing enters. The map of a part without tokens is the identity.
            chain: all parts of the sequence, in order.
            initial: what enters the chain (from the right, with `reverse`), replicated; None is zero.
            want_end: whether every rank wants what leaves the chain.
        """
        ...

    def check(self, layout: SequenceLayout) -> None:
        """Refuse, with a `UserError`, a layout that this exchange cannot serve."""
        return None

    def prepare(self, device: torch.device) -> None:
        """Measure, before the first step and on all ranks at once, what can be measured then."""
        return None

    def describe(self) -> str:
        """What was measured, chosen or given up so far, for people; empty if there is no such thing."""
        return ""


def own_links(chain: Chain, rank: int) -> list[int]:
    """Where in the chain the parts of `rank` stand, by slot."""
    return [k for _, k in sorted((link.slot, k) for k, link in enumerate(chain) if link.owner == rank)]


def label(reverse: bool) -> str:
    """The name under which state traffic is counted."""
    return "state backward" if reverse else "state forward"


def crosses(chain: Chain) -> bool:
    """Whether any document goes on from one part into a later one."""
    return any(link.enters for link in [link for link in chain if link.length][1:])


def refuse_rounding(name: str, payload_dtype: str) -> None:
    """Only gathered summaries may be rounded: a running state in bfloat16 loses more with every rank it passes."""
    if payload_dtype != "float32":
        raise UserError(
            f"Exchange {name!r} passes a running state on, which payload_dtype {payload_dtype!r} would round at every "
            "rank; use 'float32', or the exchange 'all_gather'."
        )
