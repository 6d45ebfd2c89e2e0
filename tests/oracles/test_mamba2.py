"""Our Mamba-2 layer against Hugging Face's, with the same weights: outputs and every gradient."""

import pytest
import torch

from longhaul.models.mixers.mamba2 import Mamba2, Mamba2Config
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import WholeSequence
from tests.harness.numerics import assert_close

modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
LENGTH, WIDTH = 45, 32
NAMES = {  # ours to theirs
    "in_proj.weight": "in_proj.weight",
    "conv_weight": "conv1d.weight",
    "conv_bias": "conv1d.bias",
    "dt_bias": "dt_bias",
    "A_log": "A_log",
    "D": "D",
    "norm_weight": "norm.weight",
    "out_proj.weight": "out_proj.weight",
}


@pytest.mark.parametrize("groups", (1, 2))
def test_layer_equals_hugging_face(groups: int, generator: torch.Generator) -> None:
    config = modeling.Mamba2Config(
        hidden_size=WIDTH, state_size=8, head_dim=16, num_heads=4, n_groups=groups, expand=2, chunk_size=16,
        num_hidden_layers=1, vocab_size=8, layer_norm_epsilon=1e-5,
    )  # fmt: skip
    theirs = modeling.Mamba2Mixer(config, layer_idx=0)
    ours = Mamba2(WIDTH, Mamba2Config(state_size=8, head_dim=16, num_groups=groups, chunk=16), norm_eps=1e-5)
    ours.reset_parameters()
    with torch.no_grad():
        ours.A_log.uniform_(-4, 2)  # some heads remember ten lengths
        ours.D.normal_()
        ours.norm_weight.normal_()
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
