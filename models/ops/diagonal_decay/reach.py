"""Log decays between tokens of a chunk, in a tree of halves.

A pair of tokens j < i of a chunk of C = 2 ** L tokens lies, at exactly one level, in the left and the right half of a
block of 2 s tokens (s = 1, 2, 4 ... C / 2). The decay between them is the product of two factors that never exceed one,

    exp(sum of a over (j, middle]) * exp(sum of a over (middle, i])

with the middle at the last token of the left half. So every level is a plain matrix product of decayed keys and decayed
queries: no `exp(-c_j)`, which overflows, and no difference of two long sums, which cancels, whatever the decays are.
(GLA, arXiv 2312.06635, section 4.3, has two levels, the lower one with a pairwise `exp`; a tree needs none.) Sums grow from
one level to the next by adding the total of the other half, and their gradient returns by the same steps reversed.

Legend: m chunks, H heads, C tokens of a chunk, s tokens of a half, B = C / 2 s blocks, K key width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def halves(x: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """Left and right halves of blocks of 2 s tokens, [m, H, C, K] -> views [m, H, B, s, K]."""
    both = x.unflatten(2, (x.shape[2] // (2 * s), 2, s))
    return both[:, :, :, 0], both[:, :, :, 1]


def pairs(scores: Tensor, s: int) -> Tensor:
    """Entries between the right half (queries) and the left half (keys), [m, H, C, C] -> view [m, H, B, s, s]."""
    blocks = scores.shape[2] // (2 * s)
    both = scores.unflatten(3, (blocks, 2, s)).unflatten(2, (blocks, 2, s))  # [m, H, B, 2, s, B, 2, s]
    return both[:, :, :, 1, :, :, 0].diagonal(dim1=2, dim2=4).movedim(-1, 2)


class Reach:
    """Sums of log decays inside blocks, of one token at first.

    Args:
        a: log decays, [m, H, C, K].
        read_before: a query's sum leaves out its own token.

    Attributes:
        query: sum from the block's first token to here, [m, H, C, K].
        key: sum from the token after this one to the block's last, [m, H, C, K].
        total: sum over each block, [m, H, C / span, K].
        span: tokens of a block.
    """

    def __init__(self, a: Tensor, read_before: bool) -> None:
        self.query = torch.zeros_like(a) if read_before else a.clone()
        self.key, self.total, self.span = torch.zeros_like(a), a, 1

    def decays(self) -> tuple[Tensor, Tensor]:
        """Factors of keys in left halves and of queries in right halves, when two blocks are about to merge."""
        return halves(self.key, self.span)[0].exp(), halves(self.query, self.span)[1].exp()

    def merge(self) -> None:
        """Two blocks become one."""
        total = self.total.unflatten(2, (self.total.shape[2] // 2, 2))  # [m, H, B, 2, K]
        halves(self.query, self.span)[1].add_(total[:, :, :, :1])
        halves(self.key, self.span)[0].add_(total[:, :, :, 1:])
        self.total, self.span = total.sum(3), 2 * self.span

    def merge_all(self) -> Reach:
        """To the whole chunk: `query` from its first token, `key` to its last."""
        while self.span < self.query.shape[2]:
            self.merge()
        return self


def reach_gradient(whole: Tensor, levels: list[tuple[Tensor, Tensor]], read_before: bool) -> Tensor:
    """The gradient of log decays from that of the sums, by the steps of `Reach` reversed.

    Every contribution is a product of a pair's two sides, added over the tokens between the two: nothing cancels.

    Args:
        whole: gradient of the `query` sums over the chunk, [m, H, C, K]; overwritten.
        levels: gradients of `key` sums in left halves and `query` sums in right ones, [m, H, B, s, K] each, from s = 1.

    Returns:
        [m, H, C, K].
    """
    query, key = whole, torch.zeros_like(whole)
    total = torch.zeros_like(whole[:, :, :1])
    for level in reversed(range(len(levels))):
        s = 1 << level
        left, right = halves(key, s)[0], halves(query, s)[1]
        shares = torch.stack([right.sum(3), left.sum(3)], dim=3)  # a left half's total is in the queries of the right
        total = (total[:, :, :, None] + shares).flatten(2, 3)  # [m, H, B, 1, K] + [m, H, B, 2, K]
        left += levels[level][0]
        right += levels[level][1]
    return total if read_before else total + query
