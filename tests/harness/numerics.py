"""The error measure and the tolerances of all tests, in one place.

Error of a tensor: RMS(actual - reference) / max(RMS(reference), floor). One tolerance a dtype, the same everywhere.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.complex128: 1e-10,
    torch.float32: 1e-5,
    torch.complex64: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}

# A reference smaller than this is compared absolutely: a gradient that is zero by cancellation holds rounding errors.
FLOOR = 1e-4


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().cpu().resolve_conj()
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _rms(tensor: torch.Tensor) -> float:
    return tensor.abs().square().mean().sqrt().item()


def relative_error(actual: torch.Tensor, reference: torch.Tensor, floor: float = FLOOR) -> float:
    """RMS of the error over the RMS of the reference, or over `floor` if that is larger. NaN stays NaN."""
    if actual.shape != reference.shape:
        raise ValueError(f"shapes differ: {tuple(actual.shape)} and {tuple(reference.shape)}; compare like with like")
    if actual.numel() == 0:
        return 0.0
    error, scale = _rms(_wide(actual) - _wide(reference)), _rms(_wide(reference))
    return error / max(scale, floor)


def assert_close(
    actual: torch.Tensor,
    reference: torch.Tensor,
    name: str,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
    floor: float = FLOOR,
) -> None:
    """Fail, naming the tensor and its worst entry, unless `actual` equals `reference` within the tolerance.

    Args:
        actual: what is tested, any shape.
        reference: what it should be, same shape; may be of a wider dtype.
        name: of the tensor, for the message.
        dtype: in which the computation ran, and thus the tolerance; that of `actual` if left out.
        tolerance: overrides the one of the dtype.
        floor: RMS below which a reference counts as zero.
    """
    assert actual.shape == reference.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
    allowed = TOLERANCE[dtype or actual.dtype] if tolerance is None else tolerance
    error = relative_error(actual, reference, floor)
    if error <= allowed:  # false for NaN
        return
    raise AssertionError(
        f"{name}: relative RMS error {error:.3e} > {allowed:.1e}, {actual.dtype}, {_worst(actual, reference)}"
    )


def _worst(actual: torch.Tensor, reference: torch.Tensor) -> str:
    difference = (_wide(actual) - _wide(reference)).abs().nan_to_num(nan=float("inf"))
    index = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    values = f"{actual[index].item()} instead of {reference[index].item()}"
    return f"shape {tuple(actual.shape)}, worst at {index}: {values}"


def assert_bitwise_equal(actual: torch.Tensor, reference: torch.Tensor, name: str) -> None:
    """Fail unless dtype, shape and every bit agree. NaN fails on either side: poison equals poison."""
    for what in ("dtype", "shape"):
        found, expected = getattr(actual, what), getattr(reference, what)
        assert found == expected, f"{name}: {what} {found}, expected {expected}"
    if actual.numel() == 0:
        return
    assert not actual.isnan().any() and not reference.isnan().any(), f"{name}: NaN, {_worst(actual, reference)}"
    bits = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (actual, reference)]
    different = (bits[0] != bits[1]).reshape(actual.numel(), -1).any(dim=1)
    message = f"{int(different.sum())} of {actual.numel()} entries differ"
    assert not different.any(), f"{name}: {message}, {_worst(actual, reference)}"


def assert_trees_close(actual: Any, reference: Any, name: str, **options: Any) -> None:
    """`assert_close` on all tensors of two trees of mappings, sequences (NamedTuples), numbers and None.

    A None or a key on one side only fails: a missing gradient is a wrong gradient.
    """
    if isinstance(reference, torch.Tensor):
        assert isinstance(actual, torch.Tensor), f"{name}: {type(actual).__name__}, expected a tensor"
        assert_close(actual, reference, name, **options)
    elif isinstance(reference, Mapping):
        assert isinstance(actual, Mapping), f"{name}: {type(actual).__name__}, expected a mapping"
        found, expected = sorted(map(str, actual)), sorted(map(str, reference))
        assert found == expected, f"{name}: keys {found}, expected {expected}"
        for key, value in reference.items():
            assert_trees_close(actual[key], value, f"{name}[{key!r}]", **options)
    elif isinstance(reference, Sequence) and not isinstance(reference, str):
        same = isinstance(actual, Sequence) and len(actual) == len(reference)
        assert same, f"{name}: {actual!r:.200}, expected a sequence of {len(reference)}"
        fields = getattr(reference, "_fields", range(len(reference)))
        for field, left, right in zip(fields, actual, reference, strict=True):
            path = f"{name}.{field}" if isinstance(field, str) else f"{name}[{field}]"
            assert_trees_close(left, right, path, **options)
    elif isinstance(reference, float):
        assert isinstance(actual, (int, float)), f"{name}: {actual!r:.200}, expected a number"
        wide = torch.tensor(actual, dtype=torch.float64)
        assert_close(wide, torch.tensor(reference, dtype=torch.float64), name, **options)
    else:
        assert actual == reference, f"{name}: {actual!r:.200}, expected {reference!r:.200}"
