"""Which notes each block may read, and what a part hands on.

A pool of K slots read in block b of a document holds the K best notes of the blocks before b. Best-of-a-union is
associative, so it is a segmented prefix over cells, done on indices in log2(cells) steps; rows are gathered once, and their
gradient is that gather's. Of one part the next needs its last document's `sealed` notes, the K best before the last block in
which anything was noted, and its `open` ones, the K best of that block: a reader in the same block sees the sealed ones, a
later one both. Which block that is follows from the stamps, so nothing else travels.

Legend: T tokens, N parts, M cells, K slots, n numbers of a note.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cells import Cells
from .notes import best, keys_of, positions_of


class PoolMerge:
    """The merge of (sealed, open) pools [2, K, n] of one document's consecutive tokens, for `shard.prefix`."""

    def __init__(self, size: int, policy: str) -> None:
        self.size, self.policy = size, policy

    def empty(self, like: Tensor) -> Tensor:
        return torch.zeros_like(like)

    def combine(self, earlier: Tensor, later: Tensor) -> Tensor:
        slots, rows = earlier.shape[1], torch.cat([earlier, later]).flatten(0, 1)  # [4K, n], in the order of time
        keys, blocks = keys_of(rows, self.policy), positions_of(rows) // self.size
        own = blocks == blocks.max()
        keys = torch.stack([keys.masked_fill(own, -torch.inf), keys.masked_fill(~own, -torch.inf)])  # [2, 4K]
        nothing = torch.full_like(keys, rows.shape[0], dtype=torch.int64)
        every = torch.arange(rows.shape[0], device=rows.device).expand_as(nothing)
        index = best(torch.where(keys.isneginf(), nothing, every), keys, slots)
        return torch.cat([rows, torch.zeros_like(rows[:1])])[index]


class Selection:
    """The notes of the tokens held here, sorted into pools.

    Args:
        notes: [T, n].
        slots: K.
        policy: `priority` or `fifo`.
    """

    def __init__(self, notes: Tensor, cells: Cells, slots: int, policy: str) -> None:
        self.cells, self.slots, self.policy = cells, slots, policy
        self.nothing = notes.shape[0]  # the index of an empty row
        self.rows = torch.cat([notes, notes.new_zeros(1, notes.shape[1])])
        self.keys = keys_of(self.rows, policy)
        self.own = self._own()
        self.earlier = self._earlier()

    def _own(self) -> Tensor:
        """The best notes of each cell, [M, K]."""
        cells, slots, keys = self.cells, self.slots, self.keys[:-1]
        order = keys.sort(descending=True, stable=True).indices
        order = order[cells.of_token[order].sort(stable=True).indices]  # cell by cell, the best first
        cell = cells.of_token  # cells are runs of tokens, so the sorted cells are the tokens' own
        rank = torch.arange(self.nothing, device=keys.device) - cells.start[cell]
        taken = (rank < slots) & ~keys[order].isneginf()
        spare = cells.num_cells * slots
        index = torch.full((spare + 1,), self.nothing, dtype=torch.int64, device=keys.device)
        index.scatter_(0, torch.where(taken, cell * slots + rank, spare), order)
        return index[:spare].view(cells.num_cells, slots)

    def _earlier(self) -> Tensor:
        """The best notes of the cells of the same segment before each cell, [M, K]."""
        cells, found = self.cells, self.own
        cell = torch.arange(cells.num_cells, device=found.device)
        step = 1
        while step < cells.longest:
            # `found` covers the `step` cells up to and with each one; the same number before them join.
            before = self._where(cell - step >= cells.first, found[(cell - step).clamp_min(0)])
            joined = torch.cat([before, found], dim=1)
            found = best(joined, self.keys[joined], self.slots)
            step *= 2
        return self._where(cell > cells.first, found[(cell - 1).clamp_min(0)])

    def _where(self, condition: Tensor, index: Tensor) -> Tensor:
        return torch.where(condition[:, None], index, torch.full_like(index, self.nothing))

    def element(self) -> Tensor:
        """What each part's last document contributes: sealed and open notes, [N, 2, K, n]."""
        cells = self.cells
        none = torch.full((1, self.slots), self.nothing, dtype=torch.int64, device=self.own.device)
        cell = torch.arange(cells.num_cells, device=self.own.device)
        noted = torch.where(self.own[:, 0] < self.nothing, cell, torch.full_like(cell, -1))
        latest = torch.cat([none.new_full((1,), -1), noted]).cummax(0).values[cells.last]  # [N]
        latest = torch.where(latest >= cells.last_first, latest, torch.full_like(latest, cells.num_cells))
        sealed, opened = (torch.cat([index, none])[latest] for index in (self.earlier, self.own))
        return self.rows[torch.stack([sealed, opened], dim=1)]

    def visible(self, before: Tensor) -> Tensor:
        """The pool that each cell's tokens read, [M, K, n].

        Args:
            before: sealed and open notes that came before each part, [N, 2, K, n].
        """
        cells, count = self.cells, 2 * self.slots
        past = before.flatten(0, 2)  # [N * 2K, n]
        keys = torch.cat([self.keys, keys_of(past, self.policy)])
        blocks = (positions_of(past) // cells.size).view(-1, count)[cells.part]  # [M, 2K]
        index = self.nothing + 1 + cells.part[:, None] * count + torch.arange(count, device=past.device)
        seen = (blocks < cells.block[:, None]) & cells.enters[:, None]
        index = torch.where(seen, index, torch.full_like(index, self.nothing))
        index = torch.cat([index, self.earlier], dim=1)  # in the order of time
        return torch.cat([self.rows, past])[best(index, keys[index], self.slots)]
