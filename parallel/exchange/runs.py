"""The way of a state through a chain: runs of consecutive parts of one owner, in the order they are passed.

Parts without tokens are left out: they change no state and read none. Between two runs a state crosses only if the
document goes on there, which every rank reads from the chain, so that sends and receives match without a word.

Legend: N parts held here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from longhaul.models.ops.affine import AffineMap

from .base import Chain


class Step(NamedTuple):
    """One part: its slot and tokens; `reads`: what was passed before enters it; `cut`: nothing of that leaves it."""

    slot: int
    length: int
    reads: bool
    cut: bool


class Run(NamedTuple):
    """Consecutive parts of one owner; `closed`: what leaves the run does not depend on what enters it."""

    owner: int
    steps: tuple[Step, ...]
    reads: bool
    closed: bool

    @property
    def length(self) -> int:
        return sum(step.length for step in self.steps)


def make_runs(chain: Chain, reverse: bool) -> list[Run]:
    """The runs of a chain in the order a state passes them: from the right, with `reverse`."""
    links = [link for link in chain if link.length]
    owned = []
    for k, link in enumerate(links):
        # From the right, a cotangent enters a part if the document goes on into the next one.
        reads = link.enters if not reverse else k + 1 == len(links) or links[k + 1].enters
        owned.append((link.owner, Step(link.slot, link.length, reads, link.cut)))
    if reverse:
        owned.reverse()
    runs = []
    for owner, group in groupby(owned, key=lambda pair: pair[0]):
        steps = tuple(step for _, step in group)
        closed = not all(step.reads and not step.cut for step in steps)
        runs.append(Run(owner, steps, steps[0].reads, closed))
    return runs


def pass_through(maps: AffineMap, run: Run, state: Tensor, entering: Tensor | None = None) -> Tensor:
    """The state that leaves `run` if `state` [*state_shape] enters it.

    Args:
        maps: the maps of the owner's parts, [N, *state_shape].
        entering: [N, *state_shape]; what enters each part is written here.
    """
    for step in run.steps:
        if not step.reads:
            state = torch.zeros_like(state)
        if entering is not None:
            entering[step.slot] = state
        state = maps.offset[step.slot] if step.cut else maps.select([step.slot]).apply(state[None])[0]
    return state


class Window(NamedTuple):
    """The map of consecutive runs, one map [1, *state_shape]; `closed`: it ignores what enters, and its M is void."""

    maps: AffineMap
    closed: bool

    def after(self, earlier: Window | None) -> Window:
        """First `earlier` (None: nothing), then this one."""
        if earlier is None or self.closed:
            return self
        return Window(self.maps.compose(earlier.maps), earlier.closed)

    def apply(self, state: Tensor | None) -> Tensor:
        """What leaves the window if `state` [*state_shape] enters it; None is zero."""
        return self.maps.offset[0] if self.closed or state is None else self.maps.apply(state[None])[0]


def window_of(maps: AffineMap, steps: Sequence[Step]) -> Window | None:
    """The map of consecutive parts; row `slot` of `maps` is the map of the part in that slot."""
    window: Window | None = None
    for step in steps:
        # What a part does not read counts as zero, so the part leaves its own U.
        window = Window(maps.select([step.slot]), step.cut or not step.reads).after(window)
    return window
