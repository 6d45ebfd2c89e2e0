"""fp8 is refused where it cannot be; and compiled code computes what it did."""

import os
import shutil
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from longhaul.launcher.config import TrainingConfig
from longhaul.models.compiled import check_compiler, compile_token_local
from longhaul.models.config import ModelConfig
from longhaul.models.errors import UserError
from longhaul.models.lm import LanguageModel
from longhaul.models.low_precision import check_fp8, convert_to_fp8
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import WholeSequence
from tests.harness.numerics import assert_close

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_fp8_is_refused_where_nothing_multiplies_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"train\.precision fp8 needs a GPU that multiplies in fp8, not the CPU"):
        check_fp8(CPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an older GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match=r"8\.9 or later, but an older GPU has 8\.0: set train\.precision to bf16"):
        check_fp8(GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match=r"needs torchao, which cannot be imported .* pip install torchao"):
        check_fp8(GPU)


def test_wide_layers_are_converted_and_gates_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def convert(model: torch.nn.Module, *, module_filter_fn: Any) -> None:
        seen.extend(name for name, module in model.named_modules() if module_filter_fn(module, name))

    stand_in = ModuleType("torchao.float8")
    stand_in.convert_to_float8_training = convert  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.float8", stand_in)
    config = ModelConfig(vocab_size=40, hidden_size=256, num_layers=1, num_heads=2, pattern="L", linear_mixer="gla")
    convert_to_fp8(LanguageModel(config))
    assert "layers.0.ffn.gate_up" in seen and "layers.0.ffn.down" in seen
    assert any(name.startswith("layers.0.mixer") for name in seen)
    assert not any("low_rank" in name or "head" in name for name in seen)


def test_a_machine_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longhaul.models.compiled.shutil", SimpleNamespace(which=lambda name: None))
    with pytest.raises(UserError, match=r"train\.compile needs a C\+\+ compiler on a CPU"):
        check_compiler(CPU)


INDUCTOR = pytest.param(
    "inductor",
    marks=pytest.mark.skipif(
        "LONGHAUL_TEST_COMPILE" not in os.environ or shutil.which("g++") is None,
        reason="takes a minute of a C++ compiler: set LONGHAUL_TEST_COMPILE=1",
    ),
)


@pytest.mark.parametrize("backend", ("aot_eager", INDUCTOR))
@pytest.mark.parametrize("mode", ("none", "full"))
def test_compiled_code_gives_the_same_gradients(mode: str, backend: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=40, hidden_size=16, num_layers=1, num_heads=2, pattern="L", linear_mixer="linear_attention")
    model, gradients = LanguageModel(config), []
    model.activation_checkpointing = mode
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for compiled in (False, True):
        if compiled:  # a feed-forward layer, norms of block and mixer, the last one
            assert compile_token_local(model, backend) == 5
        for length in (20, 33):  # one compilation serves any number of tokens
            model.zero_grad()
            tokens = torch.arange(length) % 40
            model(tokens, WholeSequence(Documents((0, 7, length))), labels=tokens).loss_sum.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] in (2, 3), "layer and norm; the mixer's norm is of other rank"
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, name)


def test_products_inside_compiled_code_cannot_be_kept() -> None:
    with pytest.raises(UserError, match=r"selective keeps products with weights, which compiled code does not show"):
        TrainingConfig(compile=True, activation_checkpointing="selective")
