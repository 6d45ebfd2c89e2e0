"""Tokens routed to a few of many memories, each memory a recurrence over its own tokens."""

from .buckets import Buckets, choose
from .routed import Routed
from .tails import Tail, TailMonoid, tails

__all__ = ["Buckets", "Routed", "Tail", "TailMonoid", "choose", "tails"]
