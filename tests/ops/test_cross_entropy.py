"""The chunked head loss against all logits in float64."""

import pytest
import torch

from longhaul.models.ops import cross_entropy as ops
from longhaul.models.ops.cross_entropy import chunk as fast
from tests.harness.numerics import assert_bitwise_equal, assert_close

DTYPES = [torch.float64, torch.float32]


def _inputs(tokens, dtype, width=6, vocabulary=11):
    hidden = torch.randn(tokens, width, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (tokens,)), torch.rand(tokens, dtype=torch.float64) + 0.1


def _check(hidden, weight, labels, weights, chunk, dtype=None):
    loss, total = ops.linear_cross_entropy(hidden, weight, labels, weights, chunk=chunk)
    grads = torch.autograd.grad(loss * 0.7, (hidden, weight))
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    loss_ref, total_ref = ops.naive_linear_cross_entropy(*wide, labels, weights)
    grads_ref = torch.autograd.grad(loss_ref * 0.7, wide)
    assert not total.requires_grad
    assert_close(total, total_ref, "weight_sum")
    assert_close(loss, loss_ref, "loss_sum", dtype=dtype)
    assert_close(grads[0], grads_ref[0], "dhidden", dtype=dtype)
    assert_close(grads[1], grads_ref[1], "dweight", dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [None, 1, 4, 13, 50])
@pytest.mark.parametrize("tokens", [13, 1])
def test_equals_the_oracle(tokens, chunk, dtype):
    _check(*_inputs(tokens, dtype), chunk)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_of_weight_zero_are_not_there(dtype):
    hidden, weight, labels, weights = _inputs(13, dtype)
    dropped = torch.tensor([0, 4, 5, 12])
    weights[dropped] = 0
    labels[dropped] = torch.tensor([-100, 11, 10**9, -1])
    with torch.no_grad():
        hidden[dropped] = float("nan")
    kept = weights.nonzero().squeeze(1)
    loss, total = ops.linear_cross_entropy(hidden, weight, labels, weights, chunk=4)
    grads = torch.autograd.grad(loss, (hidden, weight))
    short = hidden.detach()[kept].requires_grad_()
    expected, _ = ops.linear_cross_entropy(short, weight, labels[kept], weights[kept], chunk=4)
    grads_expected = torch.autograd.grad(expected, (short, weight))
    assert_bitwise_equal(loss, expected, "loss_sum")
    assert_close(total, weights[kept].sum(), "weight_sum")
    assert_bitwise_equal(grads[0][kept], grads_expected[0], "dhidden")
    assert_bitwise_equal(grads[1], grads_expected[1], "dweight")
    assert not grads[0][dropped].any()


@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_to_predict_stays_in_the_graph(tokens):
    hidden, weight, labels, weights = _inputs(tokens, torch.float32)
    loss, total = ops.linear_cross_entropy(hidden, weight, labels, weights * 0)
    loss.backward()
    assert loss.item() == total.item() == 0.0
    assert not hidden.grad.any() and not weight.grad.any()
    assert weight.grad.shape == weight.shape


def test_large_logits_do_not_overflow():
    hidden, weight, labels, weights = _inputs(7, torch.float32)
    _check((hidden * 200).detach().requires_grad_(), weight, labels, weights, None)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_matmuls_and_a_wide_softmax(autocast):
    hidden, weight, labels, weights = _inputs(60, torch.bfloat16)
    if autocast:
        hidden, weight = (x.detach().float().requires_grad_() for x in (hidden, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        _check(hidden, weight, labels, weights, 16, dtype=torch.bfloat16)
        loss, _ = ops.linear_cross_entropy(hidden, weight, labels, weights)
    dhidden, dweight = torch.autograd.grad(loss, (hidden, weight))
    assert loss.dtype == torch.float32
    assert (dhidden.dtype, dweight.dtype) == (hidden.dtype, weight.dtype)


def test_autocast_uses_bfloat16_and_spares_float64():
    def matmul_dtypes(dtype):
        hidden, weight, labels, weights = _inputs(9, dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low, _ = ops.linear_cross_entropy(hidden, weight, labels, weights)
        high, _ = ops.linear_cross_entropy(hidden, weight, labels, weights)
        return torch.equal(low, high)

    assert matmul_dtypes(torch.float64)
    assert not matmul_dtypes(torch.float32)


def test_logits_are_bounded():
    assert fast.default_chunk(32_000, torch.float32) * 32_000 * 4 <= fast.MAX_LOGITS_BYTES
    assert fast.default_chunk(10**9, torch.float64) == 1


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_the_gradient_asked_for(frozen):
    inputs = _inputs(9, torch.float64)
    parameters = list(inputs[:2])
    parameters[frozen] = parameters[frozen].detach()
    loss, _ = ops.linear_cross_entropy(*parameters, *inputs[2:])
    loss.backward()
    assert parameters[frozen].grad is None and parameters[1 - frozen].grad is not None
    with torch.no_grad():
        assert_bitwise_equal(ops.linear_cross_entropy(*inputs)[0], loss.detach(), "loss_sum")


def test_gradcheck():
    hidden, weight, labels, weights = _inputs(5, torch.float64)
    for op, chunk in ((ops.linear_cross_entropy, (2,)), (ops.naive_linear_cross_entropy, ())):
        rest = labels, weights, *chunk
        assert torch.autograd.gradcheck(lambda h, w, op=op, rest=rest: op(h, w, *rest)[0], (hidden, weight))
