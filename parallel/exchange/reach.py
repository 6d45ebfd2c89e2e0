"""How far back a state reaches: exchanges cut where a constant decay has forgotten, and the horizon of gates that depend on data.

Let a be the slowest decay of a layer with constant decays: `|M entry| <= exp(-a n)` for a part of n tokens. What entered the
part leaves it as M S_in, and

    |M S_in| <= exp(-L) |S_in|,    L = a n,

entry by entry. Where `exp(-L)` is at most the tolerance the part counts as cut: what leaves it is its own U, and its message
need not wait for the one before. Everything after the part sees an error of at most `exp(-L) |S_in|`, S_in being what the
exact exchange would have brought to the part, as later decays only shrink it; errors of several cut parts do not add up, since
the last one before a reader decides. The backward drops `M^T G` by the same bound.

It is a decision of the layout (lengths and constants, which all ranks know), and off unless asked for. A part still reads what
enters it, so neighbours still send one state: what is saved is the wait along the chain and what `log_scan` sends beyond
neighbours.

Legend: N parts held here, H heads, K key width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from longhaul.models.errors import UserError
from longhaul.models.ops.affine import AffineMap, Constant, Linear, LogScale
from longhaul.models.ops.recurrence import Pending
from longhaul.parallel.layout import SequenceLayout

from .base import Chain, Exchange


class Reach(Exchange):
    """Another exchange on a chain that is also cut where the slowest constant decay of a part is below a tolerance.

    Maps of other kinds pass unchanged.

    Args:
        inside: the exchange that does the work.
        tolerance: of the dropped contribution over the state it came from, between 0 and 1.
    """

    name = "reach"

    def __init__(self, inside: Exchange, tolerance: float) -> None:
        name = getattr(inside, "name", "")
        if not 0 < tolerance < 1:
            raise UserError(f"reach_tolerance is {tolerance}: give a number between 0 and 1, or leave it out.")
        if name == "all_gather":
            raise UserError(
                f"Exchange {name!r} sends all maps to all, so reach_tolerance {tolerance} saves nothing; use it with "
                "'ring', 'all_scan', 'log_scan' or 'auto'."
            )
        self.comm, self.inside, self.tolerance = inside.comm, inside, tolerance
        self.bound = 0.0  # the largest exp(-L) of a part cut so far: no state was off by more than this part of another one
        self.cuts = 0  # parts cut in the last exchange

    def check(self, layout: SequenceLayout) -> None:
        self.inside.check(layout)

    def start(
        self,
        maps: AffineMap,
        chain: Chain,
        initial: Tensor | None = None,
        reverse: bool = False,
        want_end: bool = False,
    ) -> Pending:
        chain, bounds = cut_chain(maps.linear, chain, self.tolerance)
        self.cuts, self.bound = len(bounds), max([self.bound, *bounds])
        return self.inside.start(maps, chain, initial, reverse, want_end)

    def prepare(self, device: torch.device) -> None:
        self.inside.prepare(device)

    def describe(self) -> str:
        """The bound, for people; and what the exchange inside says."""
        own = f"reach: nothing was cut yet (tolerance {self.tolerance:g})"
        if self.bound:
            own = (
                f"reach: parts are cut where constant decays leave at most {self.tolerance:g} of a state; a state is off by at "
                f"most {self.bound:.2g} of the one that was dropped"
            )
        return "\n".join(filter(None, (own, self.inside.describe())))


def cut_chain(linear: Linear, chain: Chain, tolerance: float) -> tuple[Chain, list[float]]:
    """The chain with parts cut by decay, and the bound `exp(-L)` of each part that was cut for that.

    A part that ends the decay of a document keeps `tail` and `enters`: its tokens read what enters as before.
    """
    if not isinstance(linear, Constant):
        return chain, []
    slowest = linear.log_decay.real.max().item()  # at most 0; nearest to it
    cut, bounds = [], []
    for link in chain:
        bound = math.exp(min(0.0, slowest * link.length))
        if link.length and not link.cut and bound <= tolerance:
            link = link._replace(cut=True)
            bounds.append(bound)
        cut.append(link)
    return cut, bounds


def effective_horizon(maps: AffineMap, lengths: Sequence[int], eps: float = math.exp(-20)) -> Tensor:
    """After how many tokens less than `eps` of a state is left, at the mean decay of the tokens of these maps.

    A metric of gates that depend on data: no bound, since other tokens may decay otherwise.

    Args:
        maps: of N parts, with decays (constant or `LogScale`).
        lengths: tokens of each part, [N].

    Returns:
        Tokens, shaped like the decays of one part ([H] or [H, K]); infinite without decay. Its maximum is the layer's.
    """
    tokens = sum(lengths)
    if isinstance(maps.linear, Constant):
        rate = -maps.linear.log_decay.real.double()
    elif isinstance(maps.linear, LogScale):
        rate = -maps.linear.value.double().sum(0) / max(1, tokens)
    else:
        raise ValueError(f"maps of kind {type(maps.linear).__name__} have no log decay; give Constant or LogScale maps")
    return torch.where(rate > 0, -math.log(eps) / rate.clamp_min(torch.finfo(torch.float64).tiny), math.inf)
