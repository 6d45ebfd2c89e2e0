"""Attention engines by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from longhaul.models.errors import UserError
from longhaul.parallel.comm import Comm
from longhaul.parallel.shard import AttentionEngine

from .all_gather import AllGatherAttention

ENGINES: dict[str, Callable[[Comm], AttentionEngine]] = {
    "all_gather": AllGatherAttention,
}


def make_attention(name: str, comm: Comm) -> AttentionEngine:
    """The engine called `name` on the group of `comm`."""
    if name not in ENGINES:
        near = difflib.get_close_matches(name, ENGINES, 1) or list(ENGINES)
        raise UserError(f"parallel.attention {name!r} is no attention engine; did you mean {near[0]!r}?")
    return ENGINES[name](comm)
