"""Packed tokens as rows of at most C tokens of one document: a grid for kernels that depend on distance alone.

Rows end where a document or a part ends, so no mask is needed inside a row. States pass between rows of one document;
a document that fits into a row has none.

Legend: T tokens, N parts, R rows, C tokens of a row, b boundaries (places where a state is held).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..segments import Segments


class Row:
    """A run of `length` tokens from local token `start`.

    Attributes:
        part: whose.
        reads: index of the boundary whose state enters; None if a document starts here.
        leaves: index of the boundary after it; None if its document ends here and the part goes on.
    """

    __slots__ = ("leaves", "length", "part", "reads", "start")

    def __init__(self, start: int, length: int, part: int, reads: int | None, leaves: int | None) -> None:
        self.start, self.length, self.part, self.reads, self.leaves = start, length, part, reads, leaves


class Rows:
    """The rows of `segments`.

    Attributes:
        rows: in order. Boundaries 0 .. N - 1 are the parts' entries, the rest lie behind rows.
        readers, leavers: rows that a state enters or leaves.
        last: the boundary that leaves each part, None if a part is empty.
    """

    def __init__(self, segments: Segments, size: int, device: torch.device) -> None:
        self.segments, self.size = segments, size
        self.rows: list[Row] = []
        self.last: list[int | None] = [None] * segments.num_parts
        count = segments.num_parts
        for segment, (start, stop) in enumerate(zip(segments.bounds, segments.bounds[1:])):
            part = segments.part_of[segment]
            ends_part = stop == segments.part_bounds[part + 1]
            reads = part if segments.position_of[segment] > 0 else None
            for token in range(start, stop, size):
                end = min(token + size, stop)
                leaves = None
                if end < stop or ends_part:
                    leaves, count = count, count + 1
                self.rows.append(Row(token, end - token, part, reads, leaves))
                reads = leaves
            if ends_part:
                self.last[part] = reads
        self.num_boundaries = count
        self.readers = [n for n, row in enumerate(self.rows) if row.reads is not None]
        self.leavers = [n for n, row in enumerate(self.rows) if row.leaves is not None]
        steps = torch.arange(size)
        starts = torch.tensor([row.start for row in self.rows], dtype=torch.int64)[:, None]
        lengths = torch.tensor([row.length for row in self.rows], dtype=torch.int64)[:, None]
        none = segments.num_tokens  # where a padded x holds a zero
        self.left = torch.where(steps < lengths, starts + steps, none).to(device)  # [R, C]: tokens from the row's start
        ahead = size - lengths
        self.right = torch.where(steps >= ahead, starts + steps - ahead, none).to(device)  # tokens up to the row's end

    def take(self, x: Tensor, index: Tensor) -> Tensor:
        """Rows of `x` [T + 1, D] by an index [r, C] -> [D, r, C]."""
        return x[index].permute(2, 0, 1).contiguous()  # else a batched product copies its matrices one by one

    def put(self, out: Tensor, index: Tensor, values: Tensor) -> None:
        """Add [D, r, C] to the tokens [T + 1, D] of an index [r, C], which are distinct but for the last."""
        flat, tokens = values.permute(1, 2, 0).flatten(0, 1), index.flatten()
        out[tokens] += flat


def rows_of(segments: Segments, size: int, device: torch.device) -> Rows:
    """The rows of `segments`, made once for each size and device."""
    return segments.cached(("rows", size, str(device)), lambda: Rows(segments, size, device))
