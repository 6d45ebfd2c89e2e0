"""The causal convolution against the token-by-token one in float64."""

import pytest
import torch

from longhaul.models.ops import convolution as ops
from longhaul.models.ops.convolution import chunk
from longhaul.models.ops.segments import Documents, Segments
from tests.harness.cases import document_tables
from tests.harness.numerics import assert_bitwise_equal, assert_close

TABLES = document_tables(23)
# Parts of the stream held here: all of it; awkward cuts; one shorter than the reach; zigzag; empty ones.
PARTS = {
    "whole": [(0, 23)],
    "cuts": [(0, 2), (2, 3), (3, 11), (11, 23)],
    "apart": [(3, 7), (16, 22)],
    "empty": [(0, 0), (5, 6), (6, 6), (9, 20)],
    "one token": [(4, 5)],
    "two tokens": [(4, 6)],
    "three tokens": [(4, 7)],
}


def _inputs(segments, taps, dtype, channels=5, bias=True):
    shapes = [(segments.num_tokens, channels), (segments.num_parts, taps - 1, channels), (channels, taps), (channels,)]
    values = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    return values if bias else [*values[:3], None]


def _gradients(op, inputs, dy, segments, activation):
    y = op(*inputs, segments, activation)
    wanted = [x for x in inputs if x is not None]
    return [y, *torch.autograd.grad(y, wanted, dy, materialize_grads=True)]


def _check(inputs, segments, activation, dtype=None):
    dy = torch.randn(inputs[0].shape, dtype=torch.float64).to(inputs[0].dtype)
    wide = [x if x is None else x.detach().double().requires_grad_() for x in inputs]
    actual = _gradients(ops.causal_conv, inputs, dy, segments, activation)
    expected = _gradients(ops.naive_causal_conv, wide, dy.double(), segments, activation)
    for name, x, reference in zip(("y", "dx", "dcontext", "dweight", "dbias"), actual, expected):
        assert x.dtype == inputs[0].dtype
        assert_close(x, reference, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("bounds", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("first_position", [0, 2, 50])
def test_equals_the_oracle(first_position, bounds, parts, dtype):
    segments = Segments(Documents(bounds, first_position), parts)
    _check(_inputs(segments, 4, dtype), segments, "silu")


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("taps", [1, 2, 4, 7])
def test_taps_bias_and_activation(taps, bias, activation):
    segments = Segments(Documents(TABLES["mixed"], 1), PARTS["cuts"])
    _check(_inputs(segments, taps, torch.float64, bias=bias), segments, activation)


@pytest.mark.parametrize("activation", ["silu", None])
def test_blocks_join(monkeypatch, activation):
    """Blocks of 16 tokens, with documents that cross and meet their borders."""
    monkeypatch.setattr(chunk, "CPU_BLOCK_BYTES", 1)
    for bounds in ((0, 70), (0, 16, 31, 33, 70)):
        segments = Segments(Documents(bounds), [(0, 40), (40, 70)])
        _check(_inputs(segments, 4, torch.float64), segments, activation)


def test_bfloat16_is_computed_in_float32():
    segments = Segments(Documents(TABLES["mixed"]), PARTS["cuts"])
    _check(_inputs(segments, 4, torch.bfloat16), segments, "silu")


@pytest.mark.parametrize("parts", [[], [(0, 0)], [(4, 4), (4, 4)]])
def test_no_tokens_stay_in_the_graph(parts):
    segments = Segments(Documents((0, 9)), parts)
    inputs = _inputs(segments, 4, torch.float32)
    y = ops.causal_conv(*inputs, segments, "silu")
    y.backward(torch.zeros_like(y))
    assert y.shape == (0, 5)
    assert all(not x.grad.any() and x.grad.shape == x.shape for x in inputs)


def test_another_document_changes_no_bit():
    segments = Segments(Documents((0, 2, 9, 11, 23)), [(0, 5), (5, 23)])
    x, context, weight, bias = _inputs(segments, 4, torch.float32)
    dy = torch.randn_like(x)
    own = slice(2, 9)

    def run(x, dy):
        y, dx, *_ = _gradients(ops.causal_conv, (x, context, weight, bias), dy, segments, "silu")
        return y[own], dx[own]

    def edited(x, value):
        x = x.detach().clone()
        x[:2], x[9:] = value, -value
        return x.requires_grad_()

    expected = run(x, dy)
    for value in (1e30, 0.0, float("inf")):
        for actual, reference in zip(run(edited(x, value), edited(dy, 3.0)), expected):
            assert_bitwise_equal(actual, reference, "own document")


def test_context_before_a_document_is_not_read():
    segments = Segments(Documents((0, 9)), [(0, 4), (4, 9)])
    x, context, weight, bias = (x.detach() for x in _inputs(segments, 4, torch.float64))
    poisoned = context.clone()
    poisoned[0] = float("nan")
    assert_bitwise_equal(
        ops.causal_conv(x, poisoned, weight, bias, segments), ops.causal_conv(x, context, weight, bias, segments), "y"
    )


def test_gradcheck():
    segments = Segments(Documents((0, 2, 6), 1), [(0, 3), (3, 6)])
    inputs = _inputs(segments, 3, torch.float64, channels=2)
    for op in (ops.causal_conv, ops.naive_causal_conv):
        assert torch.autograd.gradcheck(lambda *x, op=op: op(*x, segments, "silu"), inputs)


def test_wrong_calls_are_named():
    segments = Segments(Documents((0, 9)), [(0, 9)])
    x, context, weight, bias = _inputs(segments, 4, torch.float32)
    with pytest.raises(ValueError, match="'silu' or None, but is 'gelu'"):
        ops.causal_conv(x, context, weight, bias, segments, "gelu")
    with pytest.raises(ValueError, match=r"\(1, 3, 5\), but is \(1, 2, 5\)"):
        ops.causal_conv(x, context[:, 1:], weight, bias, segments)
