"""The gated delta rule and its layer against Hugging Face's Qwen3-Next, in float32 with the same weights."""

import inspect

import pytest
import torch

from longhaul.models.mixers.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig
from longhaul.models.ops.delta_rule import DeltaRule, delta_inputs
from longhaul.models.ops.segments import Segments
from longhaul.models.sequence import Documents, WholeSequence
from tests.harness.numerics import assert_close

qwen3_next = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")

LENGTH, HEADS, WIDTH_K, WIDTH_V = 150, 2, 16, 24


def test_function(generator: torch.Generator) -> None:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    q, k, v = normal(LENGTH, HEADS, WIDTH_K), normal(LENGTH, HEADS, WIDTH_K), normal(LENGTH, HEADS, WIDTH_V)
    beta = torch.rand(LENGTH, HEADS, generator=generator).requires_grad_()
    log_decay = (-0.02 * torch.rand(LENGTH, HEADS, generator=generator)).requires_grad_()
    S_in = normal(HEADS, WIDTH_K, WIDTH_V)
    dout, dS_out = torch.randn(LENGTH, HEADS, WIDTH_V, generator=generator), torch.randn(S_in.shape, generator=generator)
    leaves = dict(zip(("dq", "dk", "dv", "dlog_decay", "dbeta", "dS_in"), (q, k, v, log_decay, beta, S_in)))
    function = inspect.unwrap(qwen3_next.torch_chunk_gated_delta_rule)
    unit = torch.nn.functional.normalize(k, dim=-1)
    reference, S_reference = function(
        *(tensor[None] for tensor in (q, unit, v, log_decay, beta)), initial_state=S_in[None], output_final_state=True
    )
    expected = torch.autograd.grad((reference[0], S_reference[0]), list(leaves.values()), (dout, dS_out))
    unit = torch.nn.functional.normalize(k, dim=-1)
    segments = Segments(Documents((0, LENGTH), 1), [(0, LENGTH)])
    out, S_out = DeltaRule(64).run(delta_inputs(q * WIDTH_K**-0.5, unit, v, beta, log_decay), segments, S_in[None])
    found = torch.autograd.grad((out, S_out[0]), list(leaves.values()), (dout, dS_out))
    assert_close(out, reference[0], "out")
    assert_close(S_out[0], S_reference[0], "S_out")
    for name, a, b in zip(leaves, found, expected):
        assert_close(a, b, name)


@pytest.mark.parametrize("value_heads", (2, 4))
def test_layer(value_heads: int, generator: torch.Generator) -> None:
    width = 32
    config = qwen3_next.Qwen3NextConfig(
        hidden_size=width,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=HEADS,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=WIDTH_K,
        linear_value_head_dim=WIDTH_K,
        rms_norm_eps=1e-5,
    )
    ours = GatedDeltaNet(width, HEADS, GatedDeltaNetConfig(head_dim=WIDTH_K, num_value_heads=value_heads))
    ours.reset_parameters()
    with torch.no_grad():
        ours.norm.weight.normal_(1, 0.3, generator=generator)
        ours.A_log.uniform_(-3, 0, generator=generator)
    theirs = qwen3_next.Qwen3NextGatedDeltaNet(config, 0)
    # Theirs interleaves by key head: q k v z of a head, then the next; and b a.
    q, k, v = ours.qkv.weight.split(ours.widths)
    by_key_head = [tensor.unflatten(0, (HEADS, -1)) for tensor in (q, k, v, ours.gate.weight)]
    small = [linear.weight.unflatten(0, (HEADS, -1)) for linear in (ours.beta, ours.decay)]
    with torch.no_grad():
        theirs.in_proj_qkvz.weight.copy_(torch.cat(by_key_head, dim=1).flatten(0, 1))
        theirs.in_proj_ba.weight.copy_(torch.cat(small, dim=1).flatten(0, 1))
        theirs.conv1d.weight.copy_(ours.conv_weight[:, None])
        for name in ("A_log", "dt_bias"):
            getattr(theirs, name).copy_(getattr(ours, name))
        theirs.norm.weight.copy_(ours.norm.weight)
        theirs.out_proj.weight.copy_(ours.out.weight)
    x = torch.randn(LENGTH, width, generator=generator)
    dy = torch.randn(LENGTH, width, generator=generator)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, _ = ours(x_ours, WholeSequence(Documents((0, LENGTH))))
    y.backward(dy)
    reference = theirs(x_theirs[None])[0]
    reference.backward(dy)
    assert_close(y, reference, "output")
    assert_close(x_ours.grad, x_theirs.grad, "input gradient")
    by_head = theirs.in_proj_qkvz.weight.grad.unflatten(0, (HEADS, -1))
    pieces = by_head.split([tensor.shape[1] for tensor in by_key_head], dim=1)
    assert_close(ours.qkv.weight.grad, torch.cat([piece.flatten(0, 1) for piece in pieces[:3]]), "qkv")
    assert_close(ours.gate.weight.grad, pieces[3].flatten(0, 1), "gate")
    b, a = theirs.in_proj_ba.weight.grad.unflatten(0, (HEADS, -1)).chunk(2, dim=1)
    assert_close(ours.beta.weight.grad, b.flatten(0, 1), "beta")
    assert_close(ours.decay.weight.grad, a.flatten(0, 1), "decay")
    assert_close(ours.conv_weight.grad, theirs.conv1d.weight.grad[:, 0], "convolution")
    for name in ("A_log", "dt_bias"):
        assert_close(getattr(ours, name).grad, getattr(theirs, name).grad, name)
    assert_close(ours.norm.weight.grad, theirs.norm.weight.grad, "norm")
    assert_close(ours.out.weight.grad, theirs.out_proj.weight.grad, "out")
