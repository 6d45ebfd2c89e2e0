"""`longhaul plan calibrate`: seconds a FLOP of this machine, layer kind by layer kind.

One block of each kind, and the output projection, run forward and backward in this process at a few lengths; the planner's own
fit makes constants of the times. Lengths in between are held out: the error on them is the error to expect of a plan. What a
process does between blocks (gathering parameters, the optimizer) is not seen.

Legend: T tokens, D model width.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longhaul.launcher.config import TrainConfig
from longhaul.models.block import Block
from longhaul.models.errors import UserError
from longhaul.models.lm import LanguageHead
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import WholeSequence
from longhaul.parallel.planner import Cluster, CostModel, LayerCost, Link
from longhaul.parallel.planner.calibrate import Sample, calibrate, predict, prediction_error

from .census import HEAD, LayerFacts, ModelFacts, facts_of
from .costs import Constants, Rate

SCHEMA = 1
LENGTHS = (256, 512, 1024, 2048, 4096)
HELD_OUT = (384, 768, 1536, 3072)
LEAST = 3  # lengths that fix a square, a slope and a constant
ALONE = Cluster(1, 1e18, (Link(1, 1e9),))

Run = Callable[[], None]
Timer = Callable[[str, int, Run], float]  # kind of layer, tokens, what to time -> seconds


@dataclass(frozen=True)
class Timed:
    """A kind of layer at a length."""

    mixer: str
    tokens: int
    seconds: float
    held_out: bool


@dataclass(frozen=True)
class Calibration:
    """Fitted rates by kind of layer, mean relative error on held-out lengths by kind and of the whole `model`, and the times."""

    rates: dict[str, Rate]
    errors: dict[str, float]
    samples: tuple[Timed, ...]


class Clock:
    """Least of some runs after one that is not counted: what other programs take is left out."""

    def __init__(self, device: torch.device, repeats: int = 3) -> None:
        self.device, self.repeats = device, repeats

    def __call__(self, mixer: str, tokens: int, run: Run) -> float:
        found = []
        for _ in range(self.repeats + 1):
            self._wait()
            start = time.perf_counter()
            run()
            self._wait()
            found.append(time.perf_counter() - start)
        return min(found[1:])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def profile(
    config: TrainConfig,
    facts: ModelFacts,
    timer: Timer,
    device: torch.device,
    lengths: Sequence[int] = LENGTHS,
    held_out: Sequence[int] = HELD_OUT,
    seconds: float = 40.0,
    repeats: int = 3,
) -> list[Timed]:
    """Times by rising length, until the next length would not fit what is left of `seconds`."""
    runs = _runs(config, facts, device)
    found: list[Timed] = []
    spent, before = 0.0, (1, 0.0)
    for tokens in sorted({*lengths, *held_out}):
        expected = before[1] * (tokens / before[0]) ** 2
        if spent + expected > seconds:
            break
        here = 0.0
        for name, make in runs.items():
            once = timer(name, tokens, make(tokens))
            found.append(Timed(name, tokens, once, tokens not in lengths))
            here += once * (repeats + 1)
        spent, before = spent + here, (tokens, here)
    if len({each.tokens for each in found if not each.held_out}) < LEAST or not any(each.held_out for each in found):
        raise UserError(
            f"{seconds:g} seconds are too few to time {LEAST} lengths and one held out: give --seconds more, or shorter "
            "--lengths and --held-out."
        )
    return found


def _runs(config: TrainConfig, facts: ModelFacts, device: torch.device) -> dict[str, Callable[[int], Run]]:
    """By kind of layer: a function of T that prepares one forward and backward."""
    model, bf16 = config.model, config.train.precision == "bf16"
    found: dict[str, Callable[[int], Run]] = {}
    for layer in facts.layers:
        block = Block(model, model.layers.index(layer.letter))
        block.reset_parameters()
        found[layer.mixer] = runner(block.to(device), model.hidden_size, device, bf16)
    head = LanguageHead(model.hidden_size, model.vocab_size)
    nn.init.normal_(head.weight, std=model.initializer_range)
    found[HEAD] = runner(head.to(device), model.hidden_size, device, bf16)
    return found


def runner(module: nn.Module, width: int, device: torch.device, bf16: bool) -> Callable[[int], Run]:
    """A function of T that prepares one forward and backward of a block or a head."""

    def make(tokens: int) -> Run:
        x = torch.randn(tokens, width, device=device, requires_grad=True)  # [T, D]
        shard = WholeSequence(Documents((0, tokens)), device)
        labels = torch.zeros(tokens, dtype=torch.int64, device=device)

        def run() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                if isinstance(module, LanguageHead):
                    loss = module(x, labels, torch.ones(tokens, device=device))[0]
                else:
                    loss = module(x, shard).x.float().sum()
            loss.backward()
            module.zero_grad(set_to_none=True)
            x.grad = None

        return run

    return make


def fit(facts: ModelFacts, samples: Sequence[Timed]) -> Calibration:
    """Rates of every kind of layer, and their errors on held-out lengths."""
    layers = {layer.mixer: layer for layer in facts.layers}
    layers[HEAD] = LayerFacts("", HEAD, 1, facts.head)
    rates: dict[str, Rate] = {}
    errors: dict[str, float] = {}
    predicted: dict[int, float] = {}
    measured: dict[int, float] = {}
    for name, layer in layers.items():
        own = [(Sample((each.tokens,), 1, each.seconds), each.held_out) for each in samples if each.mixer == name]
        seen, held = ([sample for sample, out in own if out is wanted] for wanted in (False, True))
        model = calibrate(seen, ALONE, _guess(layer, seen))
        cost = model.layers[0]
        rates[name] = Rate(cost.linear / layer.linear, cost.quadratic / layer.quadratic if layer.quadratic else 0.0, model.bias)
        errors[name] = prediction_error(held, ALONE, model)
        for sample in held:
            tokens = sample.lengths[0]
            predicted[tokens] = predicted.get(tokens, 0.0) + layer.layers * predict(sample, ALONE, model)
            measured[tokens] = measured.get(tokens, 0.0) + layer.layers * sample.time
    off = [abs(predicted[tokens] / measured[tokens] - 1.0) for tokens in measured]
    return Calibration(rates, {**errors, "model": sum(off) / len(off)}, tuple(samples))


def _guess(layer: LayerFacts, samples: Sequence[Sample]) -> CostModel:
    """A first guess whose terms all show in the samples; the fit scales them."""
    longest = max(samples, key=lambda sample: sample.lengths[0])
    a_token = longest.time / longest.lengths[0]
    square = a_token / longest.lengths[0] if layer.quadratic else 0.0
    kind, engine = ("softmax", "head_split") if layer.quadratic else ("linear", "scan")
    return CostModel((LayerCost(kind, 1, engine, a_token, square, layer.window),), longest.time / 10, 1.0)


def to_json(found: Calibration, config: TrainConfig, device: str) -> dict[str, Any]:
    """What a calibration file holds."""
    return {
        "schema": SCHEMA,
        "device": device,
        "precision": config.train.precision,
        "rates": {name: asdict(rate) for name, rate in found.rates.items()},
        "error": found.errors,
        "samples": [asdict(each) for each in found.samples],
        "model": asdict(config.model),
    }


def read_calibration(path: Path) -> Constants:
    """Constants of a file that `longhaul plan calibrate` wrote."""
    remedy = "give a file that longhaul plan calibrate wrote."
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--calibration {path} cannot be read ({error.strerror}): {remedy}") from None
    except ValueError:
        raise UserError(f"--calibration {path} is not JSON: {remedy}") from None
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        raise UserError(f"--calibration {path} is no calibration of schema {SCHEMA}: {remedy}")
    try:
        rates = {name: Rate(**rate) for name, rate in values["rates"].items()}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"--calibration {path} holds no rates: {remedy}") from None
    return Constants(f"The calibration {path}", rates)


def measure(config: TrainConfig, timer: Timer | None, device: torch.device, repeats: int, **limits: Any) -> Calibration:
    """Profile and fit; `limits` as in `profile`."""
    facts = facts_of(config.model)
    return fit(facts, profile(config, facts, timer or Clock(device, repeats), device, repeats=repeats, **limits))
