"""The chain of a sequence's parts, and the prefix of affine maps along it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .affine import AffineMap


class Link(NamedTuple):
    """One part of the sequence, in chain order.

    Attributes:
        owner: who holds the part, and `slot`: which of the owner's parts it is.
        length: tokens in the part; 0 is allowed.
        tail: how many of them belong to the part's last document (all of them, unless cut).
        cut: a document starts inside the part, so nothing that came before it leaves it.
        enters: the part's first token continues a document, so what came before is read.
    """

    owner: int
    slot: int
    length: int
    tail: int
    cut: bool
    enters: bool


def fold(
    maps: AffineMap, chain: Sequence[Link], initial: Tensor | None = None, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """The exclusive prefix of `maps` along the chain.

    Forward, the state that enters each part; with `reverse` and adjoint maps, the cotangent at each part's exit.

    Args:
        maps: one map per link, in chain order, [K, *state_shape].
        initial: what enters the chain (from the right, with `reverse`), [*state_shape]; None is zero.

    Returns:
        What enters each link [K, *state_shape], and what leaves the chain [*state_shape].
    """
    state = torch.zeros_like(maps.offset[0]) if initial is None else initial.to(maps.offset.dtype)
    entering: list[Tensor] = [state] * len(chain)
    for index in range(len(chain) - 1, -1, -1) if reverse else range(len(chain)):
        link = chain[index]
        entering[index] = state if reverse or link.enters else torch.zeros_like(state)
        if link.cut:
            state = maps.offset[index]
        else:
            state = maps.select([index]).apply(state[None])[0]
    return torch.stack(entering), state
