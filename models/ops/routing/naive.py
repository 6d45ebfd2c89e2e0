"""A routed recurrence the long way: memories as heads of one recurrence over all tokens; the oracle.

A token that is not routed to a memory gives it k = 0, v = 0, no correction and no decay, which is the identity step. It
costs E / k times the work of buckets, and needs nothing but the rule.

Legend: T tokens, E memories, k memories of a token, R rows, H heads of a memory.
"""

from __future__ import annotations

from torch import Tensor

from .buckets import Buckets


def spread(rows: Tensor, buckets: Buckets) -> Tensor:
    """Rows [R, H, ...] as inputs of every memory at every token, zero where it is not chosen: [T, E H, ...]."""
    dense = rows.new_zeros(buckets.parent.num_tokens * buckets.num_memories, *rows.shape[1:])
    places = buckets.tokens * buckets.num_memories + buckets.memories
    return dense.index_add(0, places, rows).unflatten(0, (-1, buckets.num_memories)).flatten(1, 2)


def gather(dense: Tensor, buckets: Buckets) -> Tensor:
    """What the rows' own memories gave at their tokens: [T, E H, ...] -> [R, H, ...]."""
    return dense.unflatten(1, (buckets.num_memories, -1))[buckets.tokens, buckets.memories]
