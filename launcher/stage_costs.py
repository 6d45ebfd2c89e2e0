"""What layers cost on these processes, timed at the start of a run: by it a pipeline is cut into stages.

One block of each letter of the pattern, and the head, run forward and backward in this process, whole. Times become seconds a
FLOP, and these the cost of a token at the run's length: what is longer than a process can time costs as its FLOPs grow.

Letters: T tokens timed.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from longhaul.models.block import Block
from longhaul.models.lm import LanguageHead, LanguageModel
from longhaul.parallel.runtime import Runtime

from .config import TrainConfig
from .plan.calibrate import Clock, Timer, runner
from .plan.census import HEAD

MOST = 4096  # tokens
REPEATS = 3


class StageCosts(NamedTuple):
    """Seconds of a token, forward and backward: of each layer, and of the head."""

    layers: list[float]
    head: float


def measured_costs(config: TrainConfig, model: LanguageModel, runtime: Runtime, timer: Timer | None = None) -> StageCosts:
    """Time layers. All processes call this, and get the same.

    Args:
        model: the whole one, with memory or without.
        timer: replaces the clock.
    """
    timer = timer or Clock(runtime.device, REPEATS)
    parallel, length = config.parallel, config.data.seq_length
    tokens = min(-(-length // parallel.sequence_parallel_size), MOST)
    blocks = {letter: config.model.layers.index(letter) for letter in config.model.layers}
    seconds = {}
    for name in (*blocks, HEAD):
        module: nn.Module
        if name == HEAD:
            module = LanguageHead(config.model.hidden_size, config.model.vocab_size)
            nn.init.normal_(module.weight, std=config.model.initializer_range)
        else:
            module = Block(config.model, blocks[name])
            module.reset_parameters()
        make = runner(module.to(runtime.device), config.model.hidden_size, runtime.device, config.train.precision != "fp32")
        seconds[name] = _agreed(timer(name, tokens, make(tokens)), runtime)
    costs = []
    for letter, layer in zip(config.model.layers, model.layers):
        flops = [float(layer.flops_per_token(each)) for each in (tokens, length)]  # type: ignore[operator]
        costs.append(seconds[letter] / tokens * flops[1] / flops[0])
    return StageCosts(costs, seconds[HEAD] / tokens)


def _agreed(seconds: float, runtime: Runtime) -> float:
    """The slowest process's time, in two digits: differences that no cut should hang on are not there."""
    return float(f"{max(1, runtime.maximum(round(1e9 * seconds))):.1e}")
