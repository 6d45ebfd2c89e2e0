"""The products of a chunked diagonal recurrence; `chunk.py` says how they fit together, and the legend."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..affine import accumulate_dtype
from ..recurrence import Inputs
from ..segments import Segments
from .rows import Rows, rows_of

SLAB_ELEMENTS = 1 << 22  # entries of one [D, r, C] temporary


def accumulate(x: Tensor, table: Tensor) -> Tensor:
    """`sum_j table_kj x_j`: [D, r, C], complex [D, K, C] -> complex [r, D, K]."""
    if x.is_complex():
        return (x @ table.mT).transpose(0, 1)
    real = torch.view_as_real(table.mT.resolve_conj().contiguous()).flatten(2)  # [D, C, 2 K]
    return torch.view_as_complex((x @ real).unflatten(2, (-1, 2))).transpose(0, 1)


def read(states: Tensor, table: Tensor, is_complex: bool) -> Tensor:
    """`sum_k table_ki S_k`, or its real part: complex [r, D, K], complex [D, K, C] -> [D, r, C]."""
    states = states.transpose(0, 1)
    if is_complex:
        return states @ table
    left = torch.view_as_real(states.contiguous()).flatten(2)  # [D, r, 2 K]
    right = torch.view_as_real(table.conj().resolve_conj().contiguous()).transpose(2, 3).flatten(1, 2)  # [D, 2 K, C]
    return left @ right


def correlate(states: Tensor, x: Tensor) -> Tensor:
    """`sum_r conj(S_k) x_i`: complex [r, D, K], [D, r, C] -> complex [D, K, C]."""
    if x.is_complex():
        return states.permute(1, 2, 0).conj().resolve_conj().contiguous() @ x
    parts = torch.view_as_real(states).permute(1, 3, 2, 0).flatten(1, 2)  # [D, 2 K, r]
    real, imaginary = (parts @ x).chunk(2, dim=1)
    return torch.complex(real, -imaginary)


class Products:
    """The inputs as rows, and the tables of powers.

    Args:
        x: (x [T, D], log_decay [D, K], c [D, K]).
        size: C.
    """

    def __init__(self, x: Inputs, segments: Segments, size: int) -> None:
        values, log_decay, c = x
        assert values is not None and log_decay is not None and c is not None
        self.dtype = accumulate_dtype(values.dtype)
        self.log_decay, self.c = (tensor.to(self.dtype.to_complex()) for tensor in (log_decay, c))
        self.size = size
        self.rows: Rows = rows_of(segments, size, values.device)
        self.x = self.padded(values)
        self.steps = torch.arange(size + 1, dtype=self.log_decay.real.dtype, device=values.device)
        self.powers = (self.log_decay[..., None] * self.steps).exp()  # E, [D, K, C + 1]
        self.kernel = (self.c[:, None] @ self.powers[..., :-1])[:, 0]  # [D, C]
        if not values.is_complex():
            self.kernel = self.kernel.real.contiguous()
        self.distance = (torch.arange(size)[:, None] - torch.arange(size)).to(values.device)  # i - j

    def padded(self, x: Tensor) -> Tensor:
        """[T, D] -> [T + 1, D], the last row zero: what padding reads."""
        return torch.cat([x.to(self.dtype), x.new_zeros(1, x.shape[1], dtype=self.dtype)])

    def toeplitz(self) -> Tensor:
        """`kernel_{i-j}` for j <= i, else zero, [D, C, C]."""
        return self.kernel[:, self.distance.clamp_min(0)] * (self.distance >= 0)

    def slabs(self, rows: list[int]) -> Iterator[list[int]]:
        step = max(1, SLAB_ELEMENTS // max(1, self.size * self.x.shape[1]))
        for start in range(0, len(rows), step):
            yield rows[start : start + step]

    # States: at boundaries, [b, D, K]. Gains: of the rows that leave (forward) or read (backward) a state, in order.
    def gains(self) -> Tensor:
        """What each row that leaves a state adds to it."""
        table = self.powers[..., :-1].flip(-1)  # E_{C-1-j}
        found = self.log_decay.new_empty(len(self.rows.leavers), *self.log_decay.shape)
        at = 0
        for rows in self.slabs(self.rows.leavers):
            found[at : at + len(rows)] = accumulate(self.rows.take(self.x, self.rows.right[rows]), table)
            at += len(rows)
        return found

    def cotangent_gains(self, dy: Tensor) -> Tensor:
        """What the outputs of each row that reads a state say about it."""
        table = (self.c[..., None] * self.powers[..., 1:]).conj()
        found = self.log_decay.new_empty(len(self.rows.readers), *self.log_decay.shape)
        at = 0
        for rows in self.slabs(self.rows.readers):
            found[at : at + len(rows)] = accumulate(self.rows.take(dy, self.rows.left[rows]), table)
            at += len(rows)
        return found

    def states(self, S_in: Tensor | None, gains: Tensor) -> Tensor:
        """States at all boundaries, given those entering the parts [N, D, K]."""
        num_parts = len(self.rows.last)
        states = gains.new_zeros(self.rows.num_boundaries, *self.log_decay.shape)
        if S_in is not None:
            states[:num_parts] = S_in
        for gain, n in zip(gains, self.rows.leavers):
            row = self.rows.rows[n]
            assert row.leaves is not None
            states[row.leaves] = gain
            if row.reads is not None:
                states[row.leaves].addcmul_(self.powers[..., row.length], states[row.reads])
        return states

    def cotangents(self, G_out: Tensor | None, gains: Tensor) -> Tensor:
        """Cotangents at all boundaries, given those of the states leaving the parts [N, D, K]."""
        cotangents = gains.new_zeros(self.rows.num_boundaries, *self.log_decay.shape)
        for part, boundary in enumerate(self.rows.last):
            if boundary is not None and G_out is not None:
                cotangents[boundary] = G_out[part]
        for gain, n in zip(gains.flip(0), reversed(self.rows.readers)):
            row = self.rows.rows[n]
            assert row.reads is not None
            cotangents[row.reads] = gain
            if row.leaves is not None:
                cotangents[row.reads].addcmul_(self.powers[..., row.length].conj(), cotangents[row.leaves])
        return cotangents

    def leaving(self, states: Tensor) -> Tensor:
        """The states that leave the parts; zero for an empty one, [N, D, K]."""
        zero = torch.zeros_like(self.log_decay)
        return torch.stack([zero if boundary is None else states[boundary] for boundary in self.rows.last])

    def entering(self, cotangents: Tensor) -> Tensor:
        """The cotangents at the parts' entries, [N, D, K]."""
        return cotangents[: len(self.rows.last)]

    # Forward.
    def intra(self) -> Tensor:
        """Outputs from tokens of the same row, [T + 1, D]."""
        out, toeplitz = torch.zeros_like(self.x), self.toeplitz().mT
        for rows in self.slabs(list(range(len(self.rows.rows)))):
            index = self.rows.left[rows]
            self.rows.put(out, index, self.rows.take(self.x, index) @ toeplitz)
        return out

    def add_inter(self, out: Tensor, states: Tensor) -> None:
        """Add what the states entering the rows contribute; in place."""
        table = self.c[..., None] * self.powers[..., 1:]
        for rows in self.slabs(self.rows.readers):
            entering = states[[self.rows.rows[n].reads for n in rows]]
            self.rows.put(out, self.rows.left[rows], read(entering, table, out.is_complex()))

    # Backward.
    def local_gradients(self, dy: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What needs nothing from the right: of x [T + 1, D], of the powers [D, K, C + 1], and of c [D, K]."""
        dx, toeplitz = torch.zeros_like(self.x), self.toeplitz().conj().resolve_conj()
        gram = dy.new_zeros(dy.shape[1], self.size, self.size)  # sum over rows of dy_i conj(x_j)
        for rows in self.slabs(list(range(len(self.rows.rows)))):
            index = self.rows.left[rows]
            dout, x = self.rows.take(dy, index), self.rows.take(self.x, index)
            self.rows.put(dx, index, dout @ toeplitz)
            gram += dout.mT @ x.conj()
        dkernel = torch.stack([gram.diagonal(-n, 1, 2).sum(-1) for n in range(self.size)], dim=1)  # [D, C]
        dkernel = dkernel.to(self.log_decay.dtype)
        dread = torch.zeros_like(self.powers[..., 1:])  # of c_k E_{i+1}
        for rows in self.slabs(self.rows.readers):
            entering = states[[self.rows.rows[n].reads for n in rows]]
            dread += correlate(entering, self.rows.take(dy, self.rows.left[rows]))
        dc = (self.powers[..., :-1].conj() @ dkernel[..., None])[..., 0] + (self.powers[..., 1:].conj() * dread).sum(-1)
        dE = torch.zeros_like(self.powers)
        dE[..., :-1] += self.c.conj()[..., None] * dkernel[:, None]
        dE[..., 1:] += self.c.conj()[..., None] * dread
        return dx, dE, dc

    def add_state_gradients(self, dx: Tensor, dE: Tensor, states: Tensor, cotangents: Tensor) -> None:
        """Add to the gradients of x and of the powers what the cotangents of the states say; in place."""
        table = self.powers[..., :-1].flip(-1).conj().resolve_conj()
        dgain = torch.zeros_like(table)
        for rows in self.slabs(self.rows.leavers):
            leaving = cotangents[[self.rows.rows[n].leaves for n in rows]]
            index = self.rows.right[rows]
            self.rows.put(dx, index, read(leaving, table, dx.is_complex()))
            dgain += correlate(leaving, self.rows.take(self.x, index)).conj()
        dE[..., :-1] += dgain.flip(-1)
        for n in self.rows.readers:
            row = self.rows.rows[n]
            if row.leaves is not None and row.reads is not None:
                dE[..., row.length].addcmul_(states[row.reads].conj(), cotangents[row.leaves])

    def decay_gradient(self, dE: Tensor) -> Tensor:
        """Of the log decay, [D, K]."""
        return (self.steps * self.powers.conj() * dE).sum(-1)
