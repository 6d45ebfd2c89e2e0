"""Our Mamba-1 layer against Hugging Face's, with the same weights: outputs and every gradient."""

import pytest
import torch

from longhaul.models.mixers.mamba1 import Mamba1, Mamba1Config
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import WholeSequence
from tests.harness.numerics import assert_close

modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
LENGTH, WIDTH = 45, 32
NAMES = {  # ours to theirs
    "in_proj.weight": "in_proj.weight",
    "conv_weight": "conv1d.weight",
    "conv_bias": "conv1d.bias",
    "x_proj.weight": "x_proj.weight",
    "dt_proj.weight": "dt_proj.weight",
    "dt_bias": "dt_proj.bias",
    "A_log": "A_log",
    "D": "D",
    "out_proj.weight": "out_proj.weight",
}


def test_layer_equals_hugging_face(generator: torch.Generator) -> None:
    config = modeling.MambaConfig(hidden_size=WIDTH, state_size=8, num_hidden_layers=1, vocab_size=8)
    theirs = modeling.MambaMixer(config, layer_idx=0)
    ours = Mamba1(WIDTH, Mamba1Config(state_size=8, chunk=16))
    ours.reset_parameters()
    with torch.no_grad():
        ours.A_log.uniform_(-4, 2)  # some channels remember ten lengths
    parameters = dict(theirs.named_parameters())
    assert sorted(NAMES.values()) == sorted(parameters)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameters[NAMES[name]].copy_(parameter.reshape(parameters[NAMES[name]].shape))
    x = torch.randn(LENGTH, WIDTH, generator=generator)
    dy = torch.randn(LENGTH, WIDTH, generator=generator)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    y, _ = ours(leaves[0], WholeSequence(Documents((0, LENGTH))))
    expected = theirs(leaves[1][None])[0]
    y.backward(dy)
    expected.backward(dy)
    assert_close(y, expected, "y", tolerance=1e-5)
    assert_close(leaves[0].grad, leaves[1].grad, "dx", tolerance=1e-5)
    for name, parameter in ours.named_parameters():
        other = parameters[NAMES[name]].grad
        assert_close(parameter.grad, other.reshape(parameter.shape), f"gradient of {name}", tolerance=1e-5)
