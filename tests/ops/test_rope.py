"""Rotary embedding against complex multiplication, number by number."""

import cmath

import pytest
import torch

from longhaul.models.ops.rope import rope, rope_in_documents, rope_table, rotate
from longhaul.models.ops.segments import Documents, Segments
from tests.harness.numerics import assert_bitwise_equal, assert_close

POSITIONS = torch.tensor([0, 1, 2, 0, 1, 4095, 10_000_019])


def _oracle(x: torch.Tensor, positions: torch.Tensor, base: float) -> torch.Tensor:
    out, half = torch.empty_like(x, dtype=torch.float64), x.shape[-1] // 2
    for t, h, i in torch.cartesian_prod(*(torch.arange(n) for n in (*x.shape[:2], half))).tolist():
        pair = complex(x[t, h, i], x[t, h, i + half])
        turned = pair * cmath.exp(1j * positions[t].item() * base ** (-i / half))
        out[t, h, i], out[t, h, i + half] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_equals_complex_multiplication(base, dtype):
    x = torch.randn(7, 2, 6, dtype=torch.float64).to(dtype).requires_grad_()
    dy = torch.randn(7, 2, 6, dtype=torch.float64).to(dtype)
    y = rope(x, POSITIONS, base)
    y.backward(dy)
    assert y.dtype == x.grad.dtype == dtype
    assert_close(y, _oracle(x.detach(), POSITIONS, base), "y")
    # A rotation's transpose is its inverse: turn back.
    assert_close(x.grad, _oracle(dy, -POSITIONS, base), "dx")


def test_gradcheck():
    x = torch.randn(7, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rope(x, POSITIONS), x)


def test_scores_depend_on_distance_alone():
    """Far from the start too: a table in float32 would lose this at ten million tokens."""
    q, k = torch.randn(2, 1, 1, 16)
    near, far = (
        (rope(q, torch.tensor([start + 5])) * rope(k, torch.tensor([start]))).sum() for start in (3, 10_000_019)
    )
    assert_close(far, near, "score")


def test_a_shared_table_is_the_same():
    x = torch.randn(7, 2, 6)
    assert_bitwise_equal(rotate(x, rope_table(POSITIONS, 6)), rope(x, POSITIONS), "y")


def test_no_tokens():
    x = torch.zeros(0, 2, 6, requires_grad=True)
    y = rope(x, torch.zeros(0, dtype=torch.int64))
    y.backward(torch.zeros_like(y))
    assert y.shape == x.shape == x.grad.shape


def test_odd_width_is_named():
    with pytest.raises(ValueError, match="even, but is 5"):
        rope(torch.zeros(3, 2, 5), torch.zeros(3, dtype=torch.int64))


def test_one_table_serves_all_layers_of_a_stream():
    segments = Segments(Documents((0, 5, 12), first_position=3), [(2, 11)])
    x = torch.randn(9, 2, 8, dtype=torch.float64)
    assert_close(rope_in_documents(x, segments), rope(x, segments.positions()), "x")
    table = next(iter(key for key in segments._cache if key[0] == "rope"))
    kept = segments._cache[table]
    rope_in_documents(x * 2, segments)
    assert segments._cache[table] is kept
