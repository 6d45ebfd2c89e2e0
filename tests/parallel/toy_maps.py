"""Random affine maps of every kind, with gates that remember, and their fold on one process.

Legend: N maps, H heads, K key width, V value width; a state is [H, K, V], complex for some kinds.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from longhaul.models.ops.affine import AffineMap, Constant, Dense, Identity, Linear, LogScale, Scale

H, K, V = 2, 3, 5
KINDS = (
    "identity",
    "constant",
    "constant_key",
    "constant_entry",
    "constant_complex",
    "log_head",
    "log_key",
    "log_entry",
    "scale_head",
    "scale_entry",
    "scale_complex",
    "dense",
    "dense_complex",
)


def _near_one(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Factors of either sign (or any phase) with absolute values just below one."""
    size = 1 - 0.05 * torch.rand(shape, generator=generator, dtype=torch.float64)
    if dtype.is_complex:
        return torch.polar(size, 6.3 * torch.rand(shape, generator=generator, dtype=torch.float64))
    return size * torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0)


def make_linear(kind: str, lengths: Sequence[int], generator: torch.Generator) -> Linear:
    """M of parts of these lengths; the identity for a part without tokens."""
    n = len(lengths)
    name, _, axes = kind.partition("_")
    leading = {"": (H,), "head": (H,), "key": (H, K), "entry": (H, K, V), "complex": (H, K)}[axes]
    empty = torch.tensor([length == 0 for length in lengths]).reshape(n, *(1,) * len(leading))
    if name == "identity":
        return Identity()
    if name == "constant":
        # One decay for all parts and ranks: it is a constant of the layer.
        fixed = torch.Generator().manual_seed(7)
        log_decay = -0.01 * torch.rand(leading, generator=fixed, dtype=torch.float64)
        if axes == "complex":
            log_decay = torch.complex(log_decay, torch.rand(leading, generator=fixed, dtype=torch.float64))
        return Constant(log_decay, lengths)
    if name == "log":
        value = -0.05 * torch.rand(n, *leading, generator=generator, dtype=torch.float64)
        return LogScale(value.masked_fill(empty, 0.0))
    dtype = torch.complex128 if axes == "complex" else torch.float64
    if name == "scale":
        return Scale(_near_one((n, *leading), dtype, generator).masked_fill(empty, 1.0))
    matrix = torch.linalg.qr(torch.randn(n, H, K, K, generator=generator, dtype=dtype)).Q
    matrix = matrix * _near_one((n, H, 1, K), dtype, generator)
    return Dense(torch.where(empty.reshape(n, 1, 1, 1), torch.eye(K, dtype=dtype), matrix))


def is_complex(kind: str) -> bool:
    return kind.endswith("complex")


def make_states(kind: str, n: int, generator: torch.Generator) -> Tensor:
    """Random states [N, H, K, V]."""
    dtype = torch.complex128 if is_complex(kind) else torch.float64
    return torch.randn(n, H, K, V, generator=generator, dtype=dtype)


def make_maps(kind: str, lengths: Sequence[int], generator: torch.Generator) -> AffineMap:
    """Maps of parts of these lengths; the identity for a part without tokens."""
    offset = make_states(kind, len(lengths), generator)
    empty = torch.tensor([length == 0 for length in lengths]).reshape(-1, 1, 1, 1)
    return AffineMap(offset.masked_fill(empty, 0.0), make_linear(kind, lengths, generator))


def numbers(maps: AffineMap) -> int:
    """Real numbers of one packed map, written down without `pack`."""
    state = H * K * V * (2 if maps.offset.is_complex() else 1)
    if isinstance(maps.linear, (Identity, Constant)):
        return state
    value = maps.linear.matrix if isinstance(maps.linear, Dense) else maps.linear.value  # type: ignore[attr-defined]
    return state + value[0].numel() * (2 if value.is_complex() else 1)
