"""Lightning attention against Hugging Face's MiniMax layer, in float32 with the same weights: outputs and every gradient.

MiniMax activates v too, norms over all heads at once and gates by a sigmoid, which our layer (Linear-MoE's) does not. So its
projections, norm and gate are written out here, around our recurrence with our slopes.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from longhaul.models.mixers.lightning import lightning_log_decay
from longhaul.models.ops.scalar_decay import ScalarDecay
from longhaul.models.sequence import Documents, WholeSequence
from tests.harness.numerics import assert_close

minimax = pytest.importorskip("transformers.models.minimax.modeling_minimax")

LENGTH, HEADS, WIDTH, LAYERS = 150, 4, 32, 3


def ours(layer: nn.Module, index: int, x: torch.Tensor) -> torch.Tensor:
    """MiniMax's layer `index` of `LAYERS`, [T, D] -> [T, D], with the weights of `layer`."""
    q, k, v = F.silu(F.linear(x, layer.qkv_proj.weight)).unflatten(-1, (HEADS, 3, -1)).unbind(2)  # by head, then q k v
    op = ScalarDecay(lightning_log_decay("minimax", HEADS, index, LAYERS).float(), chunk=64)
    o, _ = WholeSequence(Documents((0, len(x)))).scan(op, (q, k, v, None))
    o = F.rms_norm(o.flatten(1), (WIDTH,), layer.norm.weight, layer.norm.variance_epsilon)
    return F.linear(F.linear(x, layer.output_gate.weight).sigmoid() * o, layer.out_proj.weight)


@pytest.mark.parametrize("index", range(LAYERS))
def test_layer(index: int, generator: torch.Generator) -> None:
    config = minimax.MiniMaxConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=WIDTH // HEADS,
        block_size=32,
        layer_types=["linear_attention"] * LAYERS,
    )
    layer = minimax.MiniMaxLightningAttention(config, index)
    with torch.no_grad():
        layer.norm.weight.normal_(1, 0.3, generator=generator)
    x = torch.randn(LENGTH, WIDTH, generator=generator).requires_grad_()
    dy = torch.randn(LENGTH, WIDTH, generator=generator)
    leaves = {"x": x, **dict(layer.named_parameters())}
    assert len(leaves) == 5
    reference = layer(x[None], position_embeddings=None, attention_mask=None)[0][0]
    expected = torch.autograd.grad(reference, list(leaves.values()), dy)
    y = ours(layer, index, x)
    found = torch.autograd.grad(y, list(leaves.values()), dy)
    assert_close(y, reference, "output", tolerance=1e-5)
    for name, a, b in zip(leaves, found, expected):
        assert_close(a, b, f"gradient of {name}", tolerance=1e-5)


@pytest.mark.parametrize("index", range(LAYERS))
def test_slopes(index: int) -> None:
    """To the last digit: the last layer's are so small that an error of a third would hide in its outputs."""
    config = minimax.MiniMaxConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, layer_types=["linear_attention"] * LAYERS
    )
    slopes = minimax.MiniMaxLightningAttention(config, index).slope_rate.flatten()
    decay = lightning_log_decay("minimax", HEADS, index, LAYERS)
    torch.testing.assert_close(-decay.float(), slopes, rtol=1e-5, atol=0)
