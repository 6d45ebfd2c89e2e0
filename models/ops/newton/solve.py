"""All states of `h_t = A_t h_{t-1} + b_t` in two passes over chunks, with a recursion on the chunks' maps in between.

All chunks advance side by side, one position after the other: first their maps are composed (C steps), then the states between
chunks are found by a shorter recurrence of the same kind, then those inside them (C steps). That is linear work in about
2 C log_C(L) steps.

Legend: L tokens, M chunks, C tokens of a chunk, D channels, k width of a block. Channels come last, so that products of blocks
run along them; inside, positions come first: [C, M, ...].
"""

from __future__ import annotations

import torch
from torch import Tensor


def multiply_blocks(A: Tensor, B: Tensor) -> Tensor:
    """[..., k, k, D] times [..., k, j, D], channel by channel; a batched product of tiny matrices costs a call each."""
    product = A[..., :, :1, :] * B[..., :1, :, :]
    for j in range(1, A.shape[-2]):
        product = torch.addcmul(product, A[..., :, j : j + 1, :], B[..., j : j + 1, :, :])
    return product


class Solver:
    """One run of tokens.

    Args:
        A: [L, D], diagonal; or [L, k, k, D], blocks.
        b: [L, D]; or [L, k, 1, D].
        size: C.
    """

    def __init__(self, A: Tensor, b: Tensor, size: int) -> None:
        self.length, self.diagonal = b.shape[0], A.shape == b.shape
        self.multiply = torch.mul if self.diagonal else multiply_blocks
        one = torch.ones_like(A[:1].sum(0))
        if not self.diagonal:
            one = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)[..., None].expand_as(one)
        self.identity = one
        self.size = min(size, max(self.length, 1))
        self.num_chunks = -(-self.length // self.size)
        missing = self.num_chunks * self.size - self.length
        self.A = self._chunks(torch.cat([A, self.identity.expand(missing, *A.shape[1:])]) if missing else A)
        self.b = self._chunks(torch.cat([b, b.new_zeros(missing, *b.shape[1:])]) if missing else b)
        self.outer: Solver | None = None  # the recurrence of whole chunks
        if self.num_chunks > 1:
            self.outer = Solver(*self._compose(), size)

    def _chunks(self, x: Tensor) -> Tensor:
        return x.reshape(self.num_chunks, self.size, *x.shape[1:]).transpose(0, 1).contiguous()

    def _compose(self) -> tuple[Tensor, Tensor]:
        """The map of each chunk, [M, ...] both."""
        matrix, offset = self.A[0], self.b[0]
        for A, b in zip(self.A[1:], self.b[1:]):
            matrix, offset = self.multiply(A, matrix), self.multiply(A, offset) + b
        return matrix, offset

    def total(self) -> tuple[Tensor, Tensor]:
        """The map of the run: its matrix, shaped like one A, and its offset."""
        if self.length == 0:
            return self.identity, torch.zeros_like(self.b.sum((0, 1)))
        if self.outer is not None:
            return self.outer.total()
        matrix, offset = self._compose()
        return matrix[0], offset[0]

    def found(self, entering: Tensor) -> Tensor:
        """The state each token finds, shaped like b, if `entering` enters the run."""
        h = entering[None] if self.outer is None else self.outer.found(entering)  # [M, ...]
        states = torch.empty_like(self.b)
        for position in range(self.size if self.length else 0):
            states[position] = h
            h = self.multiply(self.A[position], h) + self.b[position]
        return states.transpose(0, 1).flatten(0, 1)[: self.length]
