"""Affine maps of a recurrent state, `S -> M S + U`: what a run of tokens does to the state.

Maps compose associatively, `(M2, U2) o (M1, U1) = (M2 M1, M2 U1 + U2)`, so every form of sequence parallelism is a prefix
of them, and its backward the prefix of their adjoints from the right.

`AffineMap` is a *batch* of N maps, one per part of a sequence: an offset U and a `Linear` that stands for M. Kinds of
`Linear` differ only in how M is held, multiplied and sent; an exchange never asks which one it carries. Positive decays
travel as log sums, so that a product of many never underflows. A document that starts inside a part is a flag of the
chain (`Link.cut`), never `-inf` here.

Legend: N maps, H heads, K key width, V value width; a head's state is [K, V] and M acts on the key axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Vjp = Callable[[Tensor], Tensor]
L = TypeVar("L", bound="Linear")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which states and summaries of inputs of `dtype` are held."""
    return torch.promote_types(torch.float32, dtype)


class Linear:
    """The linear parts M of N maps."""

    def act(self, state: Tensor) -> Tensor:
        """`M S`, [N or 1, *state_shape] -> [N, *state_shape]."""
        raise NotImplementedError

    def after(self: L, earlier: L) -> L:
        """The product `M_self M_earlier`: first `earlier`, then `self`."""
        raise NotImplementedError

    def adjoint(self: L) -> L:
        """`M^T` (conjugated, if complex)."""
        raise NotImplementedError

    def pack(self, num_maps: int) -> Tensor | None:
        """What must cross the wire, [N, n]; None if every rank can know M without being told."""
        raise NotImplementedError

    def unpack(self: L, payload: Tensor, lengths: Sequence[int]) -> L:
        """The inverse of `pack` for other maps of this kind, [N, n]; `lengths`: tokens of each part."""
        raise NotImplementedError

    def columns(self: L, start: int, stop: int, state_dim: int) -> L:
        """M as it acts on entries `start:stop` of the state's last (value) axis, which no M mixes."""
        return self

    def select(self: L, index: Sequence[int]) -> L:
        """The maps of some parts."""
        raise NotImplementedError


class AffineMap:
    """N maps `S -> M S + U`.

    Args:
        offset: U, [N, *state_shape].
        linear: M.
    """

    __slots__ = ("linear", "offset")

    def __init__(self, offset: Tensor, linear: Linear) -> None:
        self.offset, self.linear = offset, linear

    @property
    def num_maps(self) -> int:
        return self.offset.shape[0]

    def apply(self, state: Tensor) -> Tensor:
        """`M S + U` for `state` [N or 1, *state_shape]."""
        return self.linear.act(state) + self.offset

    def compose(self, earlier: AffineMap) -> AffineMap:
        """The map `self o earlier`: first `earlier`, then `self`."""
        return AffineMap(self.apply(earlier.offset), self.linear.after(earlier.linear))

    def adjoint(self, cotangent: Tensor) -> AffineMap:
        """`G -> M^T G + C`: cotangents from a part's exit to its entry; `cotangent` is C, [N, *state_shape]."""
        return AffineMap(cotangent, self.linear.adjoint())

    def pack(self) -> Tensor:
        """All that must cross the wire, real, [N, n]."""
        linear = self.linear.pack(self.num_maps)
        columns = [_to_real(self.offset)] + ([] if linear is None else [_to_real(linear)])
        return torch.cat([column.to(columns[0].dtype) for column in columns], dim=1)

    def unpack(self, payload: Tensor, lengths: Sequence[int]) -> AffineMap:
        """Maps of the same kind and shape; `payload` [N', n], `lengths`: tokens of each of the N' parts."""
        size = math.prod(self.offset.shape[1:]) * (2 if self.offset.is_complex() else 1)
        offset = _from_real(payload[:, :size], self.offset.is_complex()).reshape(len(payload), *self.offset.shape[1:])
        return AffineMap(offset, self.linear.unpack(payload[:, size:], lengths))

    def split(self, blocks: int) -> list[AffineMap]:
        """Cut along the value axis (the last): `blocks` maps that may travel one after the other."""
        pieces, start = [], 0
        for piece in self.offset.tensor_split(blocks, dim=-1):
            stop = start + piece.shape[-1]
            pieces.append(AffineMap(piece, self.linear.columns(start, stop, self.offset.dim())))
            start = stop
        return pieces

    def select(self, index: Sequence[int]) -> AffineMap:
        """The maps of some parts, in the order given."""
        return AffineMap(self.offset[list(index)], self.linear.select(index))


class Identity(Linear):
    """M = 1: memory without decay. Nothing but U travels."""

    def act(self, state: Tensor) -> Tensor:
        return state

    def after(self, earlier: Identity) -> Identity:
        return self

    def adjoint(self) -> Identity:
        return self

    def pack(self, num_maps: int) -> None:
        return None

    def unpack(self, payload: Tensor, lengths: Sequence[int]) -> Identity:
        return self

    def select(self, index: Sequence[int]) -> Identity:
        return self

    @classmethod
    def from_vjp(cls, vjp: Vjp, offset: Tensor) -> Identity:
        return cls()


class Constant(Linear):
    """M = exp(length * log_decay): known to every rank from the part's length. Nothing but U travels.

    Args:
        log_decay: log decay of one token (complex for rotations), shaped like leading axes of a state: [H], [H, K].
        lengths: tokens of each part, [N].
    """

    def __init__(self, log_decay: Tensor, lengths: Sequence[int]) -> None:
        self.log_decay, self.lengths = log_decay, tuple(lengths)

    def act(self, state: Tensor) -> Tensor:
        count = torch.tensor(self.lengths, dtype=self.log_decay.real.dtype, device=self.log_decay.device)
        total = count.reshape(-1, *(1,) * self.log_decay.dim()) * self.log_decay
        return _lift(total.exp(), state) * state

    def after(self, earlier: Constant) -> Constant:
        return Constant(self.log_decay, [a + b for a, b in zip(self.lengths, earlier.lengths)])

    def adjoint(self) -> Constant:
        return Constant(self.log_decay.conj().resolve_conj(), self.lengths)

    def pack(self, num_maps: int) -> None:
        return None

    def unpack(self, payload: Tensor, lengths: Sequence[int]) -> Constant:
        return Constant(self.log_decay, lengths)

    def columns(self, start: int, stop: int, state_dim: int) -> Constant:
        if self.log_decay.dim() + 1 < state_dim:
            return self
        return Constant(self.log_decay[..., start:stop], self.lengths)

    def select(self, index: Sequence[int]) -> Constant:
        return Constant(self.log_decay, [self.lengths[i] for i in index])


class _Scale(Linear):
    """M multiplies every entry of the state by a number that depends on its leading axes.

    Args:
        value: [N, *leading axes of a state]: one per head [N, H], per key channel [N, H, K], or per entry.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def pack(self, num_maps: int) -> Tensor:
        return self.value

    def unpack(self: S, payload: Tensor, lengths: Sequence[int]) -> S:
        shape = self.value.shape[1:]
        return type(self)(_from_real(payload, self.value.is_complex()).reshape(len(payload), *shape))

    def columns(self: S, start: int, stop: int, state_dim: int) -> S:
        return self if self.value.dim() < state_dim else type(self)(self.value[..., start:stop])

    def select(self: S, index: Sequence[int]) -> S:
        return type(self)(self.value[list(index)])


S = TypeVar("S", bound=_Scale)


class LogScale(_Scale):
    """M = exp(value), positive: decays as log sums (scalar per head, diagonal on the key axis, or elementwise)."""

    def act(self, state: Tensor) -> Tensor:
        return _lift(self.value.exp(), state) * state

    def after(self, earlier: LogScale) -> LogScale:
        return LogScale(self.value + earlier.value)

    def adjoint(self) -> LogScale:
        return self

    @classmethod
    def from_vjp(cls, vjp: Vjp, offset: Tensor, axes: int) -> LogScale:
        decay = _scale_from_vjp(vjp, offset, axes)
        return cls(decay.clamp_min(torch.finfo(decay.dtype).tiny).log())  # 0: cut, and the chain says so


class Scale(_Scale):
    """M = value, of either sign or complex."""

    def act(self, state: Tensor) -> Tensor:
        return _lift(self.value, state) * state

    def after(self, earlier: Scale) -> Scale:
        return Scale(self.value * earlier.value)

    def adjoint(self) -> Scale:
        return Scale(self.value.conj().resolve_conj())

    @classmethod
    def from_vjp(cls, vjp: Vjp, offset: Tensor, axes: int) -> Scale:
        return cls(_scale_from_vjp(vjp, offset, axes).conj().resolve_conj())


class Dense(Linear):
    """M is a matrix on the key axis: delta rules [N, H, K, K] on [H, K, V]; small blocks [N, D, b, b] on [D, b, 1].

    Args:
        matrix: [N, *batch axes, K, K].
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def act(self, state: Tensor) -> Tensor:
        return self.matrix @ state

    def after(self, earlier: Dense) -> Dense:
        return Dense(self.matrix @ earlier.matrix)

    def adjoint(self) -> Dense:
        return Dense(self.matrix.mT.conj().resolve_conj())

    def pack(self, num_maps: int) -> Tensor:
        return self.matrix

    def unpack(self, payload: Tensor, lengths: Sequence[int]) -> Dense:
        return Dense(_from_real(payload, self.matrix.is_complex()).reshape(len(payload), *self.matrix.shape[1:]))

    def select(self, index: Sequence[int]) -> Dense:
        return Dense(self.matrix[list(index)])

    @classmethod
    def from_vjp(cls, vjp: Vjp, offset: Tensor) -> Dense:
        # Columns of an identity, at most V of them a time, give rows of M: (M^H e_i) is row i of M, conjugated.
        width_k, width_v = offset.shape[-2:]
        rows = []
        for start in range(0, width_k, width_v):
            count = min(width_v, width_k - start)
            probe = torch.zeros_like(offset, memory_format=torch.contiguous_format)
            index = torch.arange(count, device=offset.device)
            probe[..., start + index, index] = 1
            rows.append(vjp(probe)[..., :count].mT.conj().resolve_conj())
        return cls(torch.cat(rows, dim=-2))


def _scale_from_vjp(vjp: Vjp, offset: Tensor, axes: int) -> Tensor:
    probe = torch.zeros_like(offset, memory_format=torch.contiguous_format)
    if axes == offset.dim() - 1:
        return vjp(torch.ones_like(offset))
    # M repeats along the trailing axes, so the first entry along them tells it.
    probe.flatten(axes + 1)[..., 0] = 1
    return vjp(probe).flatten(axes + 1)[..., 0].clone()


def _lift(value: Tensor, state: Tensor) -> Tensor:
    """`value` [N, *leading] with trailing axes so that it broadcasts over `state`, in the state's dtype."""
    dtype = state.dtype if not value.is_complex() else torch.promote_types(state.dtype, value.dtype)
    return value.reshape(value.shape + (1,) * (state.dim() - value.dim())).to(dtype)


def _to_real(values: Tensor) -> Tensor:
    plain = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
    return plain.reshape(len(plain), math.prod(plain.shape[1:]))


def _from_real(values: Tensor, is_complex: bool) -> Tensor:
    if not is_complex:
        return values
    return torch.view_as_complex(values.reshape(len(values), values.shape[1] // 2, 2).contiguous())
