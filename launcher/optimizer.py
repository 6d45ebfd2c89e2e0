"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .config import OptimizerConfig


def undecayed_names(model: nn.Module) -> frozenset[str]:
    """Names of parameters that weight decay must leave alone: norms, biases, and what a module marks.

    Ask before data parallelism: sharded parameters are new objects without the mark.
    """
    return frozenset(
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim < 2 or getattr(parameter, "no_weight_decay", False)
    )


def make_optimizer(model: nn.Module, config: OptimizerConfig, undecayed: frozenset[str]) -> torch.optim.Optimizer:
    """AdamW or plain SGD with decoupled decay only where it belongs; the rate is set before each step."""
    # Parameters of one group are stepped together, which torch can do on one mesh only: experts have their own.
    found: dict[tuple[float, Any], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if name in undecayed else config.weight_decay
            found.setdefault((decay, getattr(parameter, "device_mesh", None)), []).append(parameter)
    groups = [{"params": parameters, "weight_decay": decay} for (decay, _), parameters in found.items()]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` in the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The rate of step `step`, counted from 0; a pure function, so that a resumed run needs no state of it.

    The last step of the warm-up has the full rate, the last step of the decay has `min_lr`.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    after_warmup = max(1, total_steps - config.warmup_steps)
    if config.schedule == "cosine":
        length, start = config.decay_steps or after_warmup, config.warmup_steps
    else:
        length = min(config.decay_steps or max(1, total_steps // 5), after_warmup)
        start = total_steps - length
    progress = min(1.0, max(0.0, (step + 1 - start) / length))
    if config.schedule == "cosine":
        return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr + (config.min_lr - config.lr) * progress
