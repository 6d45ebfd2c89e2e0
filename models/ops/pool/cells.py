"""Cells: the tokens of one document in one block, as held here.

Blocks are counted from the document's start, so the grid is the same however tokens are packed or spread. Readers are cut
further into tiles of a fixed number of tokens, so that all of them read in one batched product.

Legend: T tokens, N parts, M cells, C tokens of a tile, Q tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..segments import Segments

TILE = 32


class Cells:
    """The cells of `segments`, in order.

    Attributes:
        num_cells: M. `longest`: most cells of one segment.
        start [M], block [M], part [M]: first local token, block of the document, owner.
        first [M]: the first cell of the same segment. `enters` [M]: the segment reads what came before its part.
        of_token [T]: the cell of each token.
        last [N], last_first [N]: one more than the last cell of each part (0 if it has none), and the first cell of that
            one's segment (M if none).
        token_of [Q, C]: tokens of each tile, T where there is none. `cell_of_tile` [Q]. `slot_of` [T]: place in Q * C.
    """

    def __init__(self, segments: Segments, size: int, device: torch.device | str) -> None:
        start: list[int] = []
        lengths: list[int] = []
        block: list[int] = []
        part: list[int] = []
        first: list[int] = []
        enters: list[bool] = []
        last, last_first = [0] * segments.num_parts, [-1] * segments.num_parts
        self.longest = 0
        for segment, (begin, end) in enumerate(zip(segments.bounds, segments.bounds[1:])):
            position, owner, opening = segments.position_of[segment], segments.part_of[segment], len(start)
            token = begin
            while token < end:
                stop = min(end, token + size - (position + token - begin) % size)
                start.append(token)
                lengths.append(stop - token)
                block.append((position + token - begin) // size)
                part.append(owner)
                first.append(opening)
                # A document that goes on begins its part: what came before the part is its own past.
                enters.append(position > 0)
                token = stop
            last[owner], last_first[owner] = len(start), opening
            self.longest = max(self.longest, len(start) - opening)
        self.size, self.num_cells = size, len(start)
        last_first = [cell if cell >= 0 else self.num_cells for cell in last_first]

        def table(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        self.start, self.block, self.part, self.first = table(start), table(block), table(part), table(first)
        self.enters = torch.tensor(enters, dtype=torch.bool, device=device)
        self.last, self.last_first = table(last), table(last_first)
        tokens = segments.num_tokens
        cell_lengths = table(lengths)
        self.of_token = torch.repeat_interleave(cell_lengths, output_size=tokens)
        tiles = [(at, min(TILE, begin + length - at), cell)
                 for cell, (begin, length) in enumerate(zip(start, lengths))
                 for at in range(begin, begin + length, TILE)]  # fmt: skip
        tile_start, tile_length = table([tile[0] for tile in tiles]), table([tile[1] for tile in tiles])
        self.cell_of_tile = table([tile[2] for tile in tiles])
        offset = torch.arange(TILE, device=device)
        self.token_of = (tile_start[:, None] + offset).masked_fill(offset >= tile_length[:, None], tokens)
        tile_of_token = torch.repeat_interleave(tile_length, output_size=tokens)
        self.slot_of = tile_of_token * TILE + torch.arange(tokens, device=device) - tile_start[tile_of_token]


def pool_cells(segments: Segments, size: int, device: torch.device | str) -> Cells:
    """The cells of `segments` for blocks of `size` tokens, made once for each size and device."""
    return segments.cached(("pool cells", size, str(device)), lambda: Cells(segments, size, device))
