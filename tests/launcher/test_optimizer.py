"""Schedules as functions of the step, and who decays."""

import math

import pytest
import torch

from longhaul.launcher.config import OptimizerConfig
from longhaul.launcher.optimizer import learning_rate, make_optimizer, set_learning_rate, undecayed_names
from longhaul.models.config import ModelConfig
from longhaul.models.lm import LanguageModel
from longhaul.models.mixers.mamba2 import Mamba2Config


def rates(config: OptimizerConfig, steps: int) -> list[float]:
    return [learning_rate(config, step, steps) for step in range(steps)]


def test_cosine() -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=4)
    found = rates(config, 12)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[-1] == pytest.approx(0.1)
    assert found[7] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert found[3:] == sorted(found[3:], reverse=True)
    assert learning_rate(config, 100, 12) == pytest.approx(0.1), "past the end it stays"


def test_cosine_with_a_shorter_decay() -> None:
    found = rates(OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=2, decay_steps=4), 12)
    assert found[5:] == pytest.approx([0.1] * 7)


def test_wsd() -> None:
    found = rates(OptimizerConfig(lr=1.0, min_lr=0.2, warmup_steps=2, schedule="wsd", decay_steps=4), 12)
    assert found == pytest.approx([0.5, 1.0, *[1.0] * 6, 0.8, 0.6, 0.4, 0.2])
    default = rates(OptimizerConfig(lr=1.0, min_lr=0.0, warmup_steps=0, schedule="wsd"), 20)
    assert default[:16] == [1.0] * 16
    assert default[-1] == 0


def test_constant() -> None:
    assert rates(OptimizerConfig(lr=0.5, warmup_steps=2, schedule="constant"), 5) == [0.25, 0.5, 0.5, 0.5, 0.5]


def test_a_warm_up_longer_than_the_run() -> None:
    assert rates(OptimizerConfig(lr=1.0, warmup_steps=10), 3) == pytest.approx([0.1, 0.2, 0.3])


def test_who_decays() -> None:
    mamba2 = Mamba2Config(state_size=4, head_dim=8)
    model = LanguageModel(ModelConfig(hidden_size=16, num_heads=2, pattern="LN", num_layers=2, mamba2=mamba2))
    undecayed = undecayed_names(model)
    for name, parameter in model.named_parameters():
        spared = any(part in name for part in ("norm", "bias", "A_log", ".D"))
        assert (name in undecayed) == (spared or parameter.ndim < 2), name
    optimizer = make_optimizer(model, OptimizerConfig(weight_decay=0.3, betas=(0.8, 0.9), eps=1e-7), undecayed)
    by_decay = {group["weight_decay"]: group for group in optimizer.param_groups}
    assert set(by_decay) == {0.3, 0.0}
    assert len(by_decay[0.0]["params"]) == len(undecayed)
    assert by_decay[0.3]["betas"] == (0.8, 0.9)
    assert by_decay[0.3]["eps"] == 1e-7
    set_learning_rate(optimizer, 0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}


def test_sgd_is_plain() -> None:
    model = torch.nn.Linear(3, 3)
    optimizer = make_optimizer(model, OptimizerConfig(name="sgd", lr=0.5, weight_decay=0.1), undecayed_names(model))
    weight, bias = (parameter.detach().clone() for parameter in model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.step()
    once = weight - 0.5 * (1 + 0.1 * weight)
    torch.testing.assert_close(model.weight.detach(), once - 0.5 * (1 + 0.1 * once))
    torch.testing.assert_close(model.bias.detach(), bias - 1.0)
