"""Attention engines by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from longhaul.models.errors import UserError
from longhaul.parallel.comm import Comm

from .all_gather import AllGatherAttention
from .base import Engine
from .ring import Ring
from .rsa import RingSelfAttention
from .ulysses import Ulysses
from .usp import Usp

ENGINES: dict[str, Callable[..., Engine]] = {
    "all_gather": AllGatherAttention,
    "ring": Ring,
    "rsa": RingSelfAttention,
    "ulysses": Ulysses,
    "usp": Usp,
}


def make_attention(name: str, comm: Comm, **options: Any) -> Engine:
    """The engine called `name` on the group of `comm`.

    Args:
        options: of its constructor: `head_slices` for all_gather, `backward` for ring, `inner` and `outer` for usp.
    """
    if name not in ENGINES:
        near = difflib.get_close_matches(name, ENGINES, 1) or list(ENGINES)
        raise UserError(f"parallel.attention {name!r} is no attention engine; did you mean {near[0]!r}?")
    known = list(inspect.signature(ENGINES[name]).parameters)[1:]
    for option in options:
        if option not in known:
            raise UserError(f"Attention {name!r} has no option {option!r}; it takes {', '.join(known) or 'none'}.")
    return ENGINES[name](comm, **options)
