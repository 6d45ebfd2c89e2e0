"""Exchanges by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from longhaul.models.errors import UserError
from longhaul.parallel.comm import Comm

from .all_gather import AllGather
from .all_scan import AllScan
from .auto import Auto
from .base import Exchange
from .hierarchical import Hierarchical
from .log_scan import LogScan
from .reach import Reach
from .ring import Ring, RingBlocking


def _hierarchical(
    comm: Comm,
    intra: Comm | None = None,
    inter: Comm | None = None,
    inside: str = "all_gather",
    across: str = "all_scan",
    payload_dtype: str = "float32",
) -> Exchange:
    """`intra`: the ranks of this node; `inter`: the ranks with this one's index in their nodes."""
    if intra is None or inter is None:
        raise UserError(
            "Exchange 'hierarchical' needs the groups inside and across nodes; give intra and inter, or use another exchange."
        )
    return Hierarchical(
        comm,
        make_exchange(inside, intra, payload_dtype=payload_dtype),
        make_exchange(across, inter, payload_dtype=payload_dtype),
    )


EXCHANGES: dict[str, Callable[..., Exchange]] = {
    "all_gather": AllGather,
    "ring": Ring,
    "ring_blocking": RingBlocking,
    "all_scan": AllScan,
    "log_scan": LogScan,
    "hierarchical": _hierarchical,
    "auto": Auto,
}


def make_exchange(name: str, comm: Comm, reach_tolerance: float | None = None, **options: Any) -> Exchange:
    """The exchange called `name` on the group of `comm`.

    Args:
        reach_tolerance: where constant decays bound what a part passes on by this share of it, it is not passed on (see
            `Reach`); None passes everything on.
        options: of its constructor: `payload_dtype` for all, `blocks` for all_scan, `intra`, `inter`, `inside` and `across`
            for hierarchical, those of `Auto` for auto.
    """
    if name not in EXCHANGES:
        near = difflib.get_close_matches(name, EXCHANGES, 1) or list(EXCHANGES)
        raise UserError(f"parallel.exchange {name!r} is no exchange; did you mean {near[0]!r}?")
    known = list(inspect.signature(EXCHANGES[name]).parameters)[1:]
    for option in options:
        if option not in known:
            raise UserError(f"Exchange {name!r} has no option {option!r}; it takes {', '.join(known)}.")
    exchange = EXCHANGES[name](comm, **options)
    return exchange if reach_tolerance is None else Reach(exchange, reach_tolerance)
