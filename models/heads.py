"""A layer with some of its heads: what tensor parallelism holds, as mathematics of one module.

A mixer's output is a sum over heads, `W_o = [W_o1 .. W_oH]`, and a feed-forward layer's one over inner channels. So a layer
*narrowed* to some of its heads is the same layer with fewer of them, and the narrowed layers' outputs add up to the whole one's.
A layer says how its parameters divide among heads (`cuts`), and after they are sliced takes note of its new sizes
(`keep_heads`). What it sums over all heads on the way (a norm across heads, a low-rank projection of all channels) goes through
`shard.head_sum`. Parameters without a cut are shared by all heads, and stay whole.

Legend: t narrowed layers (owners of heads), this one the `part`-th.
"""

from __future__ import annotations

import operator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import nn

from .errors import UserError


class Cut(NamedTuple):
    """How one axis of a parameter divides among heads: consecutive runs of (units, rows of a unit).

    A run's units are heads, key heads, groups, channels or experts. With fewer units than owners, neighbours share one: a
    run of one unit is whole on every owner.
    """

    axis: int
    runs: tuple[tuple[int, int], ...]

    def kept(self, part: int, parts: int) -> tuple[Range, ...]:
        """What owner `part` of `parts` keeps, one range a run."""
        found, start = [], 0
        for units, rows in self.runs:
            if units % parts == 0:
                first, count, sharing = part * units // parts, units // parts, 1
            elif parts % units == 0:
                first, count, sharing = part * units // parts, 1, parts // units
            else:
                raise UserError(_uneven(units, parts))
            found.append(Range(start + first * rows, start + (first + count) * rows, sharing, first // count))
            start += units * rows
        return tuple(found)


class Range(NamedTuple):
    """Rows `start .. stop` of the whole parameter's axis, held by `sharing` neighbouring owners; the `slot`-th such range."""

    start: int
    stop: int
    sharing: int
    slot: int


class Kept(NamedTuple):
    """What is kept of a parameter: `ranges` of `axis` of the whole one, in order."""

    shape: tuple[int, ...]
    axis: int
    ranges: tuple[Range, ...]

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """A copy of what is kept of the whole one."""
        slices = [whole.detach().narrow(self.axis, r.start, r.stop - r.start) for r in self.ranges]
        return torch.cat(slices, dim=self.axis).clone()


@runtime_checkable
class Narrowable(Protocol):
    """A layer that can do with some of its heads."""

    def cuts(self) -> dict[str, Cut]:
        """How parameters and constants (buffers) divide among heads, by name; those not named are shared by all heads."""
        ...

    def keep_heads(self, part: int, parts: int) -> None:
        """Take note of having kept the `part`-th of `parts` equal shares of the heads; parameters are sliced already."""
        ...


def narrow(layer: nn.Module, part: int, parts: int) -> dict[str, Kept]:
    """Keep one of `parts` equal shares of a layer's heads, in place.

    Returns:
        What was kept of each parameter that is cut.

    Raises:
        UserError: the heads do not divide so.
    """
    assert isinstance(layer, Narrowable)
    cuts = {name: cut for name, cut in layer.cuts().items() if cut.runs}
    kept = {}
    for name, cut in cuts.items():
        whole = operator.attrgetter(name)(layer)
        ranges = cut.kept(part, parts)
        assert sum(units * rows for units, rows in cut.runs) == whole.shape[cut.axis], (name, cut, whole.shape)
        if all(held.sharing > 1 for held in ranges):  # its part of the output would be added up more than once
            raise UserError(_too_few(cut.runs[0][0], parts))
        kept[name] = Kept(tuple(whole.shape), cut.axis, ranges)
        keep_slices(layer, name, kept[name])
    layer.keep_heads(part, parts)
    return kept


def keep_slices(module: nn.Module, name: str, kept: Kept) -> None:
    """Slice a parameter or buffer in place, keeping its attributes."""
    owner, _, leaf = name.rpartition(".")
    holder = module.get_submodule(owner)
    whole: torch.Tensor = getattr(holder, leaf)
    own = kept.of(whole)
    if isinstance(whole, nn.Parameter):
        own = nn.Parameter(own, requires_grad=whole.requires_grad)
        own.__dict__.update(whole.__dict__)
    setattr(holder, leaf, own)


def share(count: int, part: int, parts: int) -> tuple[int, int]:
    """`count` divided among `parts` as `Cut` does: (how many `part` keeps, the first one)."""
    if count % parts and parts % count:
        raise UserError(_uneven(count, parts))
    return max(1, count // parts), part * count // parts


def _too_few(units: int, parts: int) -> str:
    return (
        f"parallel.tensor_parallel_size {parts} is more than a layer's {units} heads (or channels): give a size that divides "
        "them, or a model with more heads."
    )


def _uneven(units: int, parts: int) -> str:
    return (
        f"parallel.tensor_parallel_size {parts} neither divides a layer's {units} heads (or groups, or channels) nor is a "
        "multiple of them: give a size that does, or change the model's head count."
    )
