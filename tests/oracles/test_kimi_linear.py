"""Kimi Delta Attention's layer against Hugging Face's Kimi Linear, in float32 with the same weights."""

import pytest
import torch

from longhaul.models.mixers.kimi_delta import KimiDelta, KimiDeltaConfig
from longhaul.models.sequence import Documents, WholeSequence
from tests.harness.numerics import assert_close

kimi_linear = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")

LENGTH, HEADS, WIDTH_K, WIDTH = 150, 2, 16, 32


def test_layer(generator: torch.Generator) -> None:
    config = kimi_linear.KimiLinearConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_heads=HEADS,
        linear_head_dim=WIDTH_K,
        rms_norm_eps=1e-5,
    )
    ours = KimiDelta(WIDTH, HEADS, KimiDeltaConfig(head_dim=WIDTH_K))
    ours.reset_parameters()
    with torch.no_grad():
        ours.norm.weight.normal_(1, 0.3, generator=generator)
        ours.A_log.uniform_(-3, 0, generator=generator)
    theirs = kimi_linear.KimiLinearDeltaAttention(config, 0)
    same = {
        "beta.weight": theirs.b_proj.weight,
        "decay_down.weight": theirs.forget_gate.f_a_proj.weight,
        "decay_up.weight": theirs.forget_gate.f_b_proj.weight,
        "gate_down.weight": theirs.g_a_proj.weight,
        "gate_up.weight": theirs.g_b_proj.weight,
        "A_log": theirs.forget_gate.A_log,
        "dt_bias": theirs.forget_gate.dt_bias,
        "norm.weight": theirs.o_norm.weight,
        "out.weight": theirs.o_proj.weight,
        "conv_weight": theirs.conv1d.weight,
    }
    parameters = dict(ours.named_parameters())
    assert set(parameters) == {*same, "qkv.weight"}
    projections = [theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight]
    with torch.no_grad():
        for name, weight in same.items():
            weight.copy_(parameters[name].view_as(weight))
        for weight, piece in zip(projections, ours.qkv.weight.split(ours.widths)):
            weight.copy_(piece)
    x = torch.randn(LENGTH, WIDTH, generator=generator)
    dy = torch.randn(LENGTH, WIDTH, generator=generator)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, _ = ours(x_ours, WholeSequence(Documents((0, LENGTH))))
    y.backward(dy)
    reference = theirs(x_theirs[None])[0]
    reference.backward(dy)
    assert_close(y, reference, "output")
    assert_close(x_ours.grad, x_theirs.grad, "input gradient")
    for name, weight in same.items():
        assert_close(parameters[name].grad, weight.grad.view_as(parameters[name]), name)
    assert_close(ours.qkv.weight.grad, torch.cat([weight.grad for weight in projections]), "qkv")
