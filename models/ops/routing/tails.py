"""The last rows of each memory's stream, for a convolution inside it: they may lie any number of parts back.

What a part adds is the last `width` rows that its last document routed to each memory, and how many there are; merging two
such tails takes the last `width` rows of a concatenation, an associative merge of fixed size (`SequenceShard.prefix`).

Legend: N parts, E memories, Q = N E buckets, R rows, W taps, D channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .buckets import Buckets


class Tail(NamedTuple):
    """`rows` [(N,) E, W - 1, D], zeros in front where there are fewer, and `counts` [(N,) E], how many there are."""

    rows: Tensor
    counts: Tensor


class TailMonoid:
    """Merges the tail of what came later into that of what came earlier."""

    def empty(self, like: Tail) -> Tail:
        return Tail(torch.zeros_like(like.rows), torch.zeros_like(like.counts))

    def combine(self, earlier: Tail, later: Tail) -> Tail:
        width = later.rows.shape[1]
        places = torch.arange(width, device=later.rows.device) + later.counts[:, None]  # [E, W - 1]
        padded = torch.cat([earlier.rows, torch.zeros_like(later.rows)], dim=1)
        moved = padded.gather(1, places[:, :, None].expand_as(later.rows))  # by `counts` rows to the front
        return Tail(moved + later.rows, (earlier.counts + later.counts).clamp_max(width))


def tails(rows: Tensor, buckets: Buckets, width: int) -> Tail:
    """The last `width` rows [R, D] of each memory in each part's last document."""
    stops = torch.tensor(buckets.segments.part_bounds[1:], dtype=torch.int64, device=rows.device)
    counts = torch.tensor(buckets.last, dtype=torch.int64, device=rows.device).clamp_max(width)  # [N, E]
    back = torch.arange(width, 0, -1, device=rows.device)  # a tail's oldest row is `width` rows before the bucket's end
    sources = stops.reshape(*counts.shape, 1) - back  # [N, E, W - 1]
    sources = sources.masked_fill(back > counts[..., None], rows.shape[0])
    padded = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
    return Tail(padded[sources], counts)
