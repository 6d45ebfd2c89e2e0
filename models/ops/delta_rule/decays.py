"""Decays inside a chunk: what a read at token i finds of a write at token j, and its adjoint.

`c_i` is the log decay summed from the chunk's (or the document's) first token to token i, inclusive, so that the score of
a read r and a write w is `sum_k r_ik exp(c_ik - c_jk) w_jk` for j <= i. Exponents never exceed zero, whatever the decays:

- one decay a head: `(r w^T)_ij exp(c_i - c_j)`, the difference taken before `exp`.
- one decay a key channel: the sum over channels does not factor, and `exp(c_i) exp(-c_j)` overflows. The lower triangle is
  cut in halves instead, again and again: in a block of 2h tokens, reads of the second half and writes of the first meet
  at the token m between them, `exp(c_i - c_m) exp(c_m - c_j)`, both factors at most 1. Products of h x h blocks for
  h = C/2, C/4 .. 1 make up the triangle, at half the multiplications of the square.

A document that starts inside the chunk makes some exponents meaningless; they are clamped, and masks drop their scores.

Legend: m chunks, H heads, C tokens of a chunk, K key width.
"""

from __future__ import annotations

import torch
from torch import Tensor


class HeadDecays:
    """One decay a head, or none.

    Args:
        c: [m, H, C, 1] or None.
        same: [m, 1, C, C] query i sees key j.
    """

    def __init__(self, c: Tensor | None, same: Tensor, dtype: torch.dtype) -> None:
        if c is None:
            self.weights = same.to(dtype)
        else:
            self.weights = (c - c.mT).masked_fill_(~same, float("-inf")).exp_()  # [m, H, C, C]

    def scores(self, reads: list[Tensor], writes: list[Tensor]) -> list[list[Tensor]]:
        """`[r][w]`: [m, H, C, C] each, zero where a token is not seen."""
        return [[(r @ w.mT).mul_(self.weights) for w in writes] for r in reads]

    def adjoint(self, dscores: list[Tensor], read: Tensor, writes: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Gradients of a read and of the writes, [m, H, C, K], from those of its scores (free to overwrite)."""
        weighted = [dscore.mul_(self.weights) for dscore in dscores]
        dread = weighted[0] @ writes[0]
        for dscore, write in zip(weighted[1:], writes[1:]):
            dread += dscore @ write
        return dread, [dscore.mT @ read for dscore in weighted]


class ChannelDecays:
    """One decay a key channel.

    Args:
        c: [m, H, C, K], C a power of two.
        same: [m, 1, C, C] query i sees key j.
    """

    def __init__(self, c: Tensor, same: Tensor) -> None:
        self.c, self.same = c, same
        self.halves = [1 << level for level in range(c.shape[2].bit_length() - 1)]
        self.cached: dict[int, tuple[Tensor, Tensor]] = {}

    def factors(self, half: int) -> tuple[Tensor, Tensor]:
        """Of the writes in first halves and of the reads in second halves, [m, H, C / 2h, h, K]."""
        if half not in self.cached:
            first, second = _halves(self.c, half)
            middle = first[..., -1:, :]
            self.cached[half] = (middle - first).clamp_max_(0).exp_(), (second - middle).clamp_max_(0).exp_()
        return self.cached[half]

    def scores(self, reads: list[Tensor], writes: list[Tensor]) -> list[list[Tensor]]:
        """`[r][w]`: [m, H, C, C] each, zero where a token is not seen."""
        shape = *self.c.shape[:3], self.c.shape[2]
        found = [[self.c.new_zeros(shape) for _ in writes] for _ in reads]
        for half in self.halves:
            first, second = self.factors(half)
            late = [_halves(read, half)[1] * second for read in reads]
            early = [_halves(write, half)[0] * first for write in writes]
            for r, row in enumerate(found):
                for w, score in enumerate(row):
                    _block(score, half).copy_(late[r] @ early[w].mT)
        for read, row in zip(reads, found):
            for write, score in zip(writes, row):
                score.diagonal(dim1=-2, dim2=-1).copy_((read * write).sum(-1))
                score.mul_(self.same)
        return found

    def adjoint(self, dscores: list[Tensor], read: Tensor, writes: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Gradients of a read and of the writes, [m, H, C, K], from those of its scores (free to overwrite)."""
        dread, dwrites = torch.zeros_like(read), []
        for dscore in dscores:
            dscore.mul_(self.same)
        for dscore, write in zip(dscores, writes):
            own = dscore.diagonal(dim1=-2, dim2=-1)[..., None]
            dread.addcmul_(own, write)
            dwrites.append(own * read)
        for half in self.halves:
            first, second = self.factors(half)
            late = _halves(read, half)[1] * second
            dlate = torch.zeros_like(late)
            for dscore, write, dwrite in zip(dscores, writes, dwrites):
                block = _block(dscore, half)
                dlate += block @ (_halves(write, half)[0] * first)
                _halves(dwrite, half)[0].addcmul_(block.mT @ late, first)
            _halves(dread, half)[1].addcmul_(dlate, second)
        return dread, dwrites


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """[m, H, C, K] -> two views [m, H, C / 2h, h, K]."""
    first, second = x.unflatten(2, (-1, 2, half)).unbind(3)
    return first, second


def _block(scores: Tensor, half: int) -> Tensor:
    """Scores of second halves' reads and first halves' writes, [m, H, C, C] -> a view [m, H, C / 2h, h, h]."""
    blocks = scores.unflatten(3, (-1, 2 * half)).unflatten(2, (-1, 2 * half))  # [m, H, B, 2h, B, 2h]
    return blocks.diagonal(dim1=2, dim2=4).movedim(-1, 2)[..., half:, :half]
