"""ZeCO's all-scan: the running state goes rank to rank in K blocks, so that all links are busy at once.

Chou et al., "ZeCO: Zero Communication Overhead Sequence Parallelism for Linear Attention" (arXiv 2507.01004). Blocks are cut
along the value axis, which no map mixes, so every kind is served and M is never sent: a rank receives one state.
"""

from __future__ import annotations

import math

from torch import Tensor

from longhaul.models.errors import UserError
from longhaul.parallel.comm import Comm

from .walk import Walk

# What a link carries in the time of one latency (tens of GB/s times microseconds): smaller blocks cost more than they hide.
LATENCY_BYTES = 128 * 1024


class AllScan(Walk):
    """K messages, one state in all, for each run that reads from another rank (see `Walk` for the formula).

    Args:
        blocks: K, at most the value width; None: the K that is best for links of `LATENCY_BYTES`, where every block costs a
            latency: P - 1 hops of m bytes take `(P - 2 + K) (latency + m / (K bandwidth))`, least at
            `K^2 = (P - 2) m / (latency * bandwidth)`. (`auto` measures what a block costs.)
    """

    name = "all_scan"

    def __init__(self, comm: Comm, payload_dtype: str = "float32", blocks: int | None = None) -> None:
        super().__init__(comm, payload_dtype)
        if blocks is not None and blocks < 1:
            raise UserError(f"all_scan cuts a state into at least 1 block, not {blocks}.")
        self.blocks = blocks

    def num_blocks(self, state: Tensor) -> int:
        size = state.numel() * state.element_size()
        best = math.sqrt(max(0, self.comm.size - 2) * size / LATENCY_BYTES)
        return max(1, min(self.blocks or round(best), state.shape[-1]))
