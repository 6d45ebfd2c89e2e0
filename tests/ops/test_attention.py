"""Attention blocks against the whole score matrix in float64."""

import math
import types

import pytest
import torch

from longhaul.models.ops import attention as ops
from longhaul.models.ops.attention import Piece, chunk, flash, varlen
from longhaul.models.ops.attention.mask import trim
from tests.harness.cases import document_tables
from tests.harness.numerics import assert_bitwise_equal, assert_close

DTYPES = [torch.float64, torch.float32]

# queries, keys, pieces, window: what engines make of documents, caches, rings and windows
PLANS = {
    "documents": (23, 23, ops.pieces_from_segments(document_tables(23)["mixed"]), None),
    "one": (150, 150, ops.pieces_from_segments((0, 150)), None),
    "cache": (9, 14, ops.pieces_from_segments((0, 4, 9), (0, 9, 14)), None),
    "one_query": (1, 20, [Piece(0, 1, 0, 20)], None),
    "ring_earlier": (7, 9, [Piece(0, 7, 0, 9, causal=False)], None),
    "keys_later": (7, 9, [Piece(0, 7, 0, 9, causal=True, gap=-5)], None),
    "partly_earlier": (7, 9, [Piece(0, 7, 0, 9, causal=True, gap=3)], None),
    "two_key_ranges": (8, 20, [Piece(0, 8, 0, 5, causal=False), Piece(0, 8, 12, 20)], None),
    "blind": (10, 10, [Piece(2, 5, 4, 7), Piece(6, 9, 1, 2)], None),
    "shared_keys": (12, 10, [Piece(0, 4, 0, 10), Piece(4, 12, 2, 10, causal=False)], None),
    "window": (150, 150, ops.pieces_from_segments((0, 2, 147, 150)), 5),
    "window_of_one": (6, 6, ops.pieces_from_segments((0, 6)), 1),
    "window_wide": (20, 20, ops.pieces_from_segments((0, 8, 20)), 10),
    "window_cache": (5, 12, ops.pieces_from_segments((0, 5), (0, 12)), 4),
    "window_ring": (8, 8, [Piece(0, 8, 0, 8, causal=False, gap=8)], 12),
    "window_out_of_reach": (8, 8, [Piece(0, 8, 0, 8, causal=False, gap=30)], 12),
    "window_partly": (8, 8, [Piece(0, 8, 0, 8, causal=True, gap=2)], 6),
    "nothing": (4, 5, [], None),
    "empty_piece": (4, 5, [Piece(0, 0, 0, 5), Piece(1, 4, 3, 3)], None),
    "no_queries": (0, 5, [Piece(0, 0, 0, 5)], None),
    "no_keys": (4, 0, [Piece(0, 4, 0, 0)], None),
}
HEADS = {"mha": (3, 3), "gqa": (4, 2), "mqa": (4, 1), "single": (1, 1)}


def _inputs(queries, keys, heads, key_heads, dtype, width=8, value_width=8):
    shapes = (queries, heads, width), (keys, key_heads, width), (keys, key_heads, value_width)
    q, k, v = (torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)
    return (q, k, v), torch.randn(queries, heads, value_width, dtype=torch.float64).to(dtype)


def _reference(inputs, dout, pieces, scale, window):
    wide = [x.detach().double().requires_grad_() for x in inputs]
    with torch.autocast("cpu", enabled=False):
        out, lse = ops.naive_attention(*wide, pieces, scale, window)
    return out, lse, torch.autograd.grad(out, wide, dout.double())


def _check(inputs, dout, pieces, scale, window):
    out, lse = ops.attention(*inputs, pieces, scale, window)
    grads = torch.autograd.grad(out, inputs, dout)
    out_ref, lse_ref, grads_ref = _reference(inputs, dout, pieces, scale, window)
    assert not lse.requires_grad
    assert_close(out, out_ref, "out")
    blind = lse_ref == -math.inf
    assert torch.equal(lse == -math.inf, blind)
    assert_close(lse.masked_fill(blind, 0), lse_ref.masked_fill(blind, 0), "lse")
    assert not out[blind].any()
    for name, grad, grad_ref in zip("qkv", grads, grads_ref):
        # Inputs are of size 1; with one key to see, dq is zero by cancellation.
        assert_close(grad, grad_ref, "d" + name, floor=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_attention_equals_the_oracle(plan, heads, dtype):
    queries, keys, pieces, window = plan
    inputs, dout = _inputs(queries, keys, *heads, dtype)
    _check(inputs, dout, pieces, 0.3, window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_width_may_differ(dtype):
    inputs, dout = _inputs(9, 9, 4, 2, dtype, width=6, value_width=10)
    _check(inputs, dout, ops.pieces_from_segments((0, 4, 9)), 0.4, None)


def test_gradcheck():
    inputs, _ = _inputs(5, 7, 2, 1, torch.float64, width=3, value_width=3)
    pieces = [Piece(0, 2, 0, 3), Piece(2, 5, 3, 7)]
    assert torch.autograd.gradcheck(lambda q, k, v: ops.attention(q, k, v, pieces, 0.5, 3)[0], inputs)
    assert torch.autograd.gradcheck(lambda q, k, v: ops.naive_attention(q, k, v, pieces, 0.5, 3)[0], inputs)


def test_bfloat16_partials_are_float32():
    inputs, dout = _inputs(40, 60, 4, 2, torch.bfloat16)
    pieces = [Piece(0, 40, 0, 60)]
    out, lse = ops.attend_varlen(*inputs, pieces, 0.3)
    grads = ops.attend_varlen_backward(dout, *inputs, out, lse, pieces, 0.3)
    assert {x.dtype for x in (out, lse, *grads)} == {torch.float32}
    out_ref, _, grads_ref = _reference(inputs, dout, pieces, 0.3, None)
    for name, x, reference in zip(("out", "dq", "dk", "dv"), (out, *grads), (out_ref, *grads_ref)):
        assert_close(x, reference, name, dtype=torch.bfloat16)


@pytest.mark.parametrize("window", [None, 4])
def test_autocast_lowers_nothing(window):
    inputs, dout = _inputs(12, 12, 4, 2, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _check(inputs, dout, ops.pieces_from_segments((0, 12)), 0.3, window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 4, 9])
def test_a_ring_of_blocks_equals_the_whole(window, dtype):
    """Queries stand still, key blocks come by; the backward of each block takes the merged out and lse."""
    edges = (0, 7, 8, 20)
    inputs, dout = _inputs(20, 20, 4, 2, dtype)
    q, k, v = (x.detach() for x in inputs)
    out_ref, _, grads_ref = _reference(inputs, dout, ops.pieces_from_segments((0, 20)), 0.3, window)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for start, stop in zip(edges, edges[1:]):
        rows, blocks = slice(start, stop), []
        out, lse = torch.zeros_like(q[rows]), torch.full((stop - start, 4), -math.inf, dtype=dtype)
        for k_start, k_stop in zip(edges, edges[1:]):  # the blocks of later ranks come by too, and change nothing
            blocks.append((slice(k_start, k_stop), {"causal": k_stop > start, "window": window, "gap": stop - k_stop}))
        for keys, call in blocks:
            out, lse = ops.merge(out, lse, *ops.attend_block(q[rows], k[keys], v[keys], 0.3, **call))
        assert_close(out, out_ref[rows], "out")
        for keys, call in blocks:
            grads = ops.attend_block_backward(dout[rows], q[rows], k[keys], v[keys], out, lse, 0.3, **call)
            for total, grad in ((dq[rows], grads[0]), (dk[keys], grads[1]), (dv[keys], grads[2])):
                total += grad
    for name, grad, grad_ref in zip("qkv", (dq, dk, dv), grads_ref):
        assert_close(grad, grad_ref, "d" + name)


@pytest.mark.parametrize("difference", [0.0, 3.0, -40.0, 200.0, -2e4])
def test_merge_is_stable(difference):
    out_a, out_b = torch.randn(2, 3, 2, 4)
    lse_a = torch.randn(3, 2)
    lse_b = lse_a + difference
    out, lse = ops.merge(out_a, lse_a, out_b, lse_b)
    total = torch.logaddexp(lse_a.double(), lse_b.double())
    share_a, share_b = ((x.double() - total).exp()[..., None] for x in (lse_a, lse_b))
    assert_close(out, share_a * out_a.double() + share_b * out_b.double(), "out")
    assert_close(lse, total, "lse")


def test_merge_with_a_side_that_saw_nothing():
    seen, lse = torch.randn(3, 2, 4), torch.randn(3, 2)
    blind, none = torch.zeros(3, 2, 4), torch.full((3, 2), -math.inf)
    for arguments in ((seen, lse, blind, none), (blind, none, seen, lse)):
        for actual, expected in zip(ops.merge(*arguments), (seen, lse)):
            assert_bitwise_equal(actual, expected, "merged with nothing")
    out, both = ops.merge(blind, none, blind, none)
    assert not out.any() and (both == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 4])
def test_another_document_changes_no_bit(window, dtype):
    (q, k, v), dout = _inputs(30, 30, 4, 2, dtype)
    pieces = ops.pieces_from_segments((0, 3, 17, 30))

    def run(q, k, v):
        inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out, _ = ops.attention(*inputs, pieces, 0.3, window)
        return [x[3:17] for x in (out, *torch.autograd.grad(out, inputs, dout))]

    expected = run(q, k, v)
    edited = [torch.cat([torch.full_like(x[:3], 1e4), x[3:17], torch.randn_like(x[17:])]) for x in (q, k, v)]
    for name, actual, reference in zip(("out", "dq", "dk", "dv"), run(*edited), expected):
        assert_bitwise_equal(actual, reference, name)


def test_nothing_to_do_stays_in_the_graph():
    for queries, keys in ((0, 0), (0, 3), (3, 0)):
        inputs, dout = _inputs(queries, keys, 4, 2, torch.float32)
        out, lse = ops.attention(*inputs, [], 0.3)
        out.backward(dout)
        assert all(x.grad is not None and x.grad.shape == x.shape for x in inputs)
        assert lse.shape == (queries, 4)


def test_inputs_are_left_alone():
    inputs, dout = _inputs(6, 6, 1, 1, torch.float64)
    copies = [x.detach().clone() for x in inputs]
    out, _ = ops.attention(*inputs, ops.pieces_from_segments((0, 6)), 0.3)
    out.backward(dout)
    for x, copy in zip(inputs, copies):
        assert_bitwise_equal(x.detach(), copy, "input")


def test_plain_memory_is_bounded(monkeypatch):
    """A smaller allowance gives smaller blocks and the same numbers."""
    inputs, dout = _inputs(33, 40, 4, 2, torch.float64)
    monkeypatch.setattr(chunk, "MAX_SCORES_BYTES", 3 * 4 * 40 * 8)
    largest = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: (largest.append(a.shape[1] * b.shape[2]), bmm(a, b))[1])
    _check(inputs, dout, [Piece(0, 33, 0, 40)], 0.3, None)
    assert max(largest) <= 3 * 2 * 40


def test_kernels_chosen_on_a_cpu():
    square = ops.pieces_from_segments((0, 8))

    def kernels(dtype, pieces=square, window=None, value_width=8):
        (q, _, v), _ = _inputs(8, 8, 2, 2, dtype, value_width=value_width)
        return [job.kernel for job in varlen._plan(q, v, pieces, window)]

    assert kernels(torch.float32) == kernels(torch.bfloat16) == ["cpu"]
    assert kernels(torch.float32, window=8) == ["cpu"]
    assert kernels(torch.float32, [Piece(2, 8, 0, 8)]) == ["cpu", "cpu"]
    assert kernels(torch.float64) == ["chunk"]
    assert kernels(torch.float32, window=7) == ["chunk"]
    assert kernels(torch.float32, value_width=4) == ["chunk"]


def _toy_flash_attn() -> types.ModuleType:
    """The two functions of flash-attn used here, with its conventions, computed by the oracle."""
    module = types.ModuleType("toy")

    def pieces_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, causal, **_):
        assert dropout_p == 0.0 and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        assert max_seqlen_q == max(b - a for a, b in zip(queries, queries[1:]))
        assert max_seqlen_k == max(b - a for a, b in zip(keys, keys[1:]))
        return [Piece(*bounds, causal) for bounds in zip(queries, queries[1:], keys, keys[1:])]

    def attend(q, k, v, softmax_scale, causal, window_size_left, window_size_right, **call):
        assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
        assert window_size_right == (0 if causal else -1)
        pieces = pieces_of(causal=causal, **call)
        window = None if window_size_left < 0 else window_size_left + 1
        return ops.naive_attention(q, k, v, pieces, softmax_scale, window)

    def forward(q, k, v, **call):
        out, lse = attend(q, k, v, **call)
        return out, lse.transpose(0, 1).contiguous(), None, None

    def backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, *, softcap, alibi_slopes, deterministic, **call):
        assert softmax_lse.is_contiguous() and softcap == 0.0 and alibi_slopes is None and deterministic is False
        wide = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            grads = torch.autograd.grad(attend(*wide, **call)[0], wide, dout)
        for buffer, grad in zip((dq, dk, dv), grads):
            buffer.copy_(grad)

    module._flash_attn_varlen_forward, module._flash_attn_varlen_backward = forward, backward
    return module


def test_runs_packed_for_flash_attn(monkeypatch):
    monkeypatch.setattr(flash, "varlen_fits", lambda q, v: True)
    monkeypatch.setattr(flash, "flash_attn_module", _toy_flash_attn)
    kept = {name: plan for name, plan in PLANS.items() if name != "two_key_ranges"}  # the toy knows no merged lse
    for queries, keys, pieces, window in kept.values():
        inputs, dout = _inputs(queries, keys, 4, 2, torch.float64)
        _check(inputs, dout, pieces, 0.3, window)
    q = torch.zeros(23, 2, 8)
    for plan in ("documents", "cache", "window"):
        _, _, pieces, window = PLANS[plan]
        jobs = varlen._plan(q, q, pieces, window)
        assert [job.kernel for job in jobs] == ["flash_attn"], "documents that tile the tokens are one call"


def test_trim_keeps_what_is_seen():
    assert trim(Piece(0, 8, 0, 8, causal=True), None) == Piece(0, 8, 0, 8, causal=True)
    assert trim(Piece(0, 8, 0, 20, causal=True), 3) == Piece(0, 8, 10, 20, causal=True)
    assert trim(Piece(0, 8, 0, 8, causal=False, gap=100), 3) is None
    with pytest.raises(ValueError, match="at least 1"):
        trim(Piece(0, 8, 0, 8), 0)


def test_wrong_shapes_are_named():
    q, k = torch.zeros(3, 4, 8), torch.zeros(3, 3, 8)
    with pytest.raises(ValueError, match="multiple of Hkv"):
        ops.attend_varlen(q, k, k, [], 0.3)
