"""What each mode of activation checkpointing keeps, where it waits, and that a backward reads it there."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longhaul.models.config import ModelConfig
from longhaul.models.lm import LanguageModel
from longhaul.models.ops import recompute
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import WholeSequence
from tests.harness.numerics import assert_close

TOKENS, WIDTH, FFN = 64, 32, 48
BYTES = 8 * TOKENS * WIDTH  # of one activation of the stream


class Shelf:
    """Stands in for the host: what is put there is copied, counted once, and may be spoilt."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.bytes = 0

    def put(self, tensor: Tensor) -> Any:
        self.bytes += tensor.numel() * tensor.element_size()
        copy = tensor.detach().clone()
        return "away", copy * self.factor if copy.is_floating_point() else copy

    def get(self, held: Any) -> Tensor:
        return held[1]


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> Shelf:
    made = Shelf()
    monkeypatch.setattr(recompute, "Host", made)
    monkeypatch.setattr(recompute, "SMALL", TOKENS)
    return made


def gradients(mode: str, offload: bool, mixer: str = "linear_attention") -> dict[str, Tensor]:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=40,
        hidden_size=WIDTH,
        ffn_hidden_size=FFN,
        num_layers=2,
        num_heads=2,
        pattern="LN",
        linear_mixer=mixer,
    )
    model = LanguageModel(config).double()
    model.activation_checkpointing, model.activation_offload = mode, offload
    tokens = torch.arange(TOKENS) % 40
    model(tokens, WholeSequence(Documents((0, 20, TOKENS))), labels=tokens).loss_sum.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("mode", recompute.MODES)
def test_a_backward_reads_what_waited_on_the_host(mode: str, shelf: Shelf) -> None:
    expected = gradients("none", offload=False)
    assert shelf.bytes == 0
    found = gradients(mode, offload=True)
    for name, gradient in expected.items():
        assert_close(found[name], gradient, name)
    shelf.factor = 2.0
    assert any(not torch.equal(gradient, expected[name]) for name, gradient in gradients(mode, offload=True).items())


def test_full_keeps_blocks_inputs_and_selective_what_is_dear(shelf: Shelf) -> None:
    kept = {}
    for mode in recompute.MODES:
        gradients(mode, offload=True)
        kept[mode], shelf.bytes = shelf.bytes, 0
    states = 2 * 2 * 16 * 16 * 8  # before and after the recurrent layer
    assert kept["full"] == 2 * BYTES + states
    # Queries, keys, values, gate, output and gate-up of the feed-forward layer, the scan's result; not what is added last.
    assert kept["selective"] < kept["none"] * 0.6
    dear = kept["selective"] - kept["full"]
    linear, softmax = (5 + 2 * FFN / WIDTH + 1) * BYTES, (4 + 2 * FFN / WIDTH + 1) * BYTES
    assert dear == linear + softmax + 8 * TOKENS * 2  # and a log-sum-exp a head


def test_a_kept_tensor_must_not_be_written_to() -> None:
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            out = self.second(y.cos()).sin()
            y.add_(1.0)
            return out

    module = Careless()
    out = recompute.checkpoint(module, torch.ones(2, 3, requires_grad=True), mode="selective")
    with pytest.raises(AssertionError, match="was written to"):
        out.sum().backward()


def test_what_is_never_run_backward_leaves_no_memory_behind() -> None:
    """A tape hangs on the graph, and must not be hung on by it."""
    import gc
    import weakref

    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh())
    gc.disable()
    try:
        out = recompute.checkpoint(model, torch.ones(2, 3, requires_grad=True), mode="selective")
        tapes = [weakref.ref(thing) for thing in gc.get_objects() if type(thing) is recompute.Tape]
        assert tapes and all(tape() is not None for tape in tapes)
        del out
    finally:
        gc.enable()
    gc.collect()
    assert all(tape() is None for tape in tapes)
