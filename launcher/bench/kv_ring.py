"""Ring attention on a linear layer: the peer that published claims about state exchanges are against. For comparison only.

Keys and values go round, as in ring attention (`longhaul.parallel.attention.rotate`), and each rank multiplies from the left:

    o_i += sum over j of an earlier block:  exp(a (i - j)) (q_i . k_j) v_j,        a the head's constant log decay

T^2 products for each pair of blocks, where a state needs T; what a rank receives grows with the tokens. Its own block, with the
causal mask, is the kernel of the other engines. The backward moves keys and values again, and their gradients home.

A block goes only to the ranks after it: the rank p receives, of K + V numbers a token and head, the tokens of p blocks
forward, and backward the same and the gradients of p - 1 blocks on their way, and of its own if any rank follows.

Legend: T tokens of a rank, P ranks, H heads, K key width, V value width.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from longhaul.models.ops.recurrence import EachPart, scan
from longhaul.models.ops.scalar_decay.chunk import ScalarDecay
from longhaul.models.ops.segments import Documents, Segments
from longhaul.parallel.attention.rotate import Homeward, Rotation
from longhaul.parallel.comm import Comm

ROWS = 512  # queries whose scores are held at once


class Seconds(NamedTuple):
    """Of the kernels: the own block, and a block of another rank; forward and backward."""

    own: float
    own_backward: float
    other: float
    other_backward: float


class Kernels(Protocol):
    """The local work. `ahead`: tokens from the first of an earlier block to the first of the own one."""

    def own(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...

    def own_backward(self, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...

    def other(self, q: Tensor, k: Tensor, v: Tensor, ahead: int) -> Tensor: ...

    def other_backward(self, q: Tensor, k: Tensor, v: Tensor, ahead: int, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...


class Computed:
    """Kernels that compute.

    Args:
        log_decay: a, [H].
    """

    def __init__(self, log_decay: Tensor) -> None:
        self.log_decay, self.op = log_decay, ScalarDecay(log_decay)

    def own(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        segments = Segments(Documents((0, len(q))), [(0, len(q))])
        self.leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            self.out = scan(self.op, (*self.leaves, None), segments, EachPart(segments))[0]
        return self.out.detach()

    def own_backward(self, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = torch.autograd.grad(self.out, self.leaves, dout)
        return dq, dk, dv

    def _factors(self, size: int, sign: int, first: int, like: Tensor) -> Tensor:
        """exp(a (first + sign t)) of tokens t, [size, H, 1]: never above 1."""
        return torch.exp(self.log_decay.to(like) * (first + sign * torch.arange(size))[:, None])[..., None]

    def other(self, q: Tensor, k: Tensor, v: Tensor, ahead: int) -> Tensor:
        q, k = q * self._factors(len(q), 1, 0, q), k * self._factors(len(k), -1, ahead, k)
        k, v = k.transpose(0, 1), v.transpose(0, 1)  # [H, T, K]
        return torch.cat([(rows.transpose(0, 1) @ k.mT @ v).transpose(0, 1) for rows in q.split(ROWS)])

    def other_backward(self, q: Tensor, k: Tensor, v: Tensor, ahead: int, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        by_q, by_k = self._factors(len(q), 1, 0, q), self._factors(len(k), -1, ahead, k)
        keys, values = (k * by_k).transpose(0, 1), v.transpose(0, 1)
        dk, dv, dq = torch.zeros_like(keys), torch.zeros_like(values), []
        for rows, drows in zip((q * by_q).split(ROWS), dout.split(ROWS)):
            rows, drows = rows.transpose(0, 1), drows.transpose(0, 1)
            scores, dscores = rows @ keys.mT, drows @ values.mT  # [H, rows, T]
            dq.append((dscores @ keys).transpose(0, 1))
            dk += dscores.mT @ rows
            dv += scores.mT @ drows
        return torch.cat(dq) * by_q, dk.transpose(0, 1) * by_k, dv.transpose(0, 1).contiguous()


class Slept:
    """Kernels that sleep for as long as those took alone; what they give has the right shape."""

    def __init__(self, seconds: Seconds) -> None:
        self.seconds = seconds

    def own(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        time.sleep(self.seconds.own)
        return v

    def own_backward(self, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        time.sleep(self.seconds.own_backward)
        return dout, dout, dout

    def other(self, q: Tensor, k: Tensor, v: Tensor, ahead: int) -> Tensor:
        time.sleep(self.seconds.other)
        return torch.zeros(())

    def other_backward(self, q: Tensor, k: Tensor, v: Tensor, ahead: int, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        time.sleep(self.seconds.other_backward)
        return torch.zeros(()), k, v


def forward_backward(
    comm: Comm, kernels: Kernels, bounds: Sequence[int], q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One document, of which rank p holds the tokens `bounds[p] .. bounds[p + 1]`.

    Args:
        q, k: [T, H, K]. v, dout: [T, H, V].

    Returns:
        The outputs [T, H, V], and the gradients of q, k and v.
    """
    reach = [comm.size - 1 - rank for rank in range(comm.size)]

    def empty(rank: int) -> tuple[Tensor, ...]:
        return tuple(x.new_empty(bounds[rank + 1] - bounds[rank], *x.shape[1:]) for x in (k, v))

    def ahead(rank: int) -> int:
        return bounds[comm.rank] - bounds[rank]

    rotation = Rotation(comm, (k, v), empty, reach, "ring forward")
    out = kernels.own(q, k, v)
    for _, source, block in rotation:
        if block is not None:
            out = out + kernels.other(q, block[0], block[1], ahead(source))
    rotation = Rotation(comm, (k, v), empty, reach, "ring backward")
    homes = [Homeward(rotation, lambda rank: empty(rank)[0]), Homeward(rotation, lambda rank: empty(rank)[1])]
    dq, *own = kernels.own_backward(dout)
    for hop, source, block in rotation:
        shares: list[Tensor | None] = [None, None]
        if block is not None:
            more, *shares = kernels.other_backward(q, block[0], block[1], ahead(source), dout)
            dq = dq + more
        for home, share in zip(homes, shares):
            home.add(hop, share)
    dk, dv = (x if (total := home.total()) is None else x + total for x, home in zip(own, homes))
    return out, dq, dk, dv


def alone(comm: Comm, kernels: Kernels, bounds: Sequence[int], q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
    """The local work of `forward_backward` and no communication: the own block in place of the others."""
    kernels.own(q, k, v)
    for rank in range(comm.rank):
        kernels.other(q, k, v, bounds[comm.rank] - bounds[rank])
    kernels.own_backward(dout)
    for rank in range(comm.rank):
        kernels.other_backward(q, k, v, bounds[comm.rank] - bounds[rank], dout)
