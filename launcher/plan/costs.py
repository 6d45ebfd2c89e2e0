"""From a run's configuration to the planner's cost model.

Compute is FLOPs times seconds a FLOP: published (an A100, from the 7B constants of FlexSP), or measured on this machine by
`longhaul plan calibrate`. Traffic is counted from the model's shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from longhaul.launcher.config import TrainConfig
from longhaul.models.errors import UserError
from longhaul.parallel.planner import CostModel, LayerCost, published
from longhaul.parallel.planner.cost import LAYERS, PUBLISHED, SOFTMAX_ENGINES, STATE_ENGINES

from .census import DENSE, HEAD, LayerFacts, ModelFacts

# The model behind the published 7B constants.
PUBLISHED_WIDTH, PUBLISHED_PARAMETERS = 4096, 6.7e9
ADAM_BYTES = 16  # a parameter, its gradient and two moments in float32

# Exchanges and attention engines of a run -> the planner's formulas.
LINEAR_ENGINE = {
    "all_gather": "all_gather", "ring": "ring", "ring_blocking": "ring", "all_scan": "scan", "log_scan": "scan",
    "hierarchical": "scan", "auto": "scan",
}  # fmt: skip
SOFTMAX_ENGINE = {
    "all_gather": "all_gather", "ring": "ring", "rsa": "ring", "ulysses": "head_split", "usp": "head_split",
}  # fmt: skip


@dataclass(frozen=True)
class Rate:
    """Seconds a FLOP of one kind of layer on a rank of speed 1, and seconds a layer costs a micro-batch whatever is in it."""

    linear: float
    quadratic: float = 0.0
    bias: float = 0.0


@dataclass(frozen=True)
class Constants:
    """Speed of a machine.

    Attributes:
        name: where the numbers are from.
        rates: by name of the mixer, and for `dense` and `head`.
        default: of every other layer; None: there is none, and such a layer is an error.
        bias_per_parameter: seconds a micro-batch costs for every parameter (gathering them).
    """

    name: str
    rates: Mapping[str, Rate]
    default: Rate | None = None
    bias_per_parameter: float = 0.0

    def rate(self, mixer: str) -> Rate:
        """Of a kind of layer."""
        found = self.rates.get(mixer, self.default)
        if found is None:
            raise UserError(
                f"{self.name} has no times of {mixer} layers (it has {', '.join(sorted(self.rates))}): run longhaul plan "
                "calibrate with this model's --config, or leave --calibration out for the published constants."
            )
        return found


def published_constants() -> Constants:
    """Seconds a FLOP of the published 7B model."""
    model = published("7B")
    quadratic = model.layers[0].quadratic / (6 * PUBLISHED_WIDTH)  # 12 D s^2 / 2, forward and backward, causal
    linear = PUBLISHED["7B"][1] / (6 * PUBLISHED_PARAMETERS)
    return Constants("published", {}, Rate(linear, quadratic), model.bias / PUBLISHED_PARAMETERS)


def cost_model(
    facts: ModelFacts,
    config: TrainConfig,
    constants: Constants,
    ranks: int,
    linear_engine: str | None = None,
    softmax_engine: str | None = None,
    objective: str = "sum",
) -> CostModel:
    """Cost model of a run.

    Args:
        facts: of `config.model`.
        config: engines, precision and recomputation are read.
        constants: seconds a FLOP.
        ranks: over which `fsdp` shards model states.
        linear_engine: instead of `parallel.exchange`'s.
        softmax_engine: instead of `parallel.attention`'s.
        objective: `sum` or `split`.
    """
    parallel, recompute = config.parallel, config.train.activation_checkpointing == "full"
    number = 2 if config.train.precision == "bf16" else 4
    mixing = sum(layer.layers for layer in facts.layers if layer.mixer != DENSE)
    head = constants.rate(HEAD)
    rest, bias = head.linear * facts.head, head.bias + constants.bias_per_parameter * facts.parameters
    for layer in facts.layers:
        rate = constants.rate(layer.mixer)
        bias += layer.layers * rate.bias
        if layer.mixer == DENSE:
            rest += layer.layers * rate.linear * layer.linear
    share = rest / mixing if mixing else rest  # what sends nothing is spread over the layers that do
    engines = (
        linear_engine or LINEAR_ENGINE[parallel.exchange],
        softmax_engine or SOFTMAX_ENGINE[parallel.attention],
    )
    layers = tuple(
        _layer(layer, constants.rate(layer.mixer), share, engines, number, facts.width)
        for layer in facts.layers
        if layer.mixer != DENSE
    )
    if not layers:
        layers = (LayerCost("softmax", 1, "head_split", linear=rest),)
    depth = sum(layer.layers for layer in facts.layers)
    a_layer = PUBLISHED["7B"][3] / LAYERS / PUBLISHED_WIDTH / 2 * number * facts.width  # activations a token keeps
    per_token = a_layer + number * facts.width * depth if recompute else a_layer * depth
    states = ADAM_BYTES * facts.parameters / (ranks if parallel.data_parallel_backend == "fsdp" else 1)
    return CostModel(layers, bias, per_token, states, objective)


def _layer(facts: LayerFacts, rate: Rate, share: float, engines: tuple[str, str], number: int, width: int) -> LayerCost:
    linear_engine, softmax_engine = engines
    linear = rate.linear * facts.linear + share
    if facts.mixer == "attention":
        # All-to-all of queries, keys, values and outputs both ways; else keys and values, again in the backward, and back.
        sent = 2 * facts.heads if softmax_engine == "head_split" else 3 * facts.key_value
        quadratic = rate.quadratic * facts.quadratic
        return LayerCost("softmax", facts.layers, softmax_engine, linear, quadratic, facts.window, float(sent * number), passes=2)
    whole = linear_engine == "head_split"
    return LayerCost(
        "linear",
        facts.layers,
        linear_engine,
        linear,
        token_bytes=8.0 * number * width if whole else 0.0,
        state_bytes=0.0 if whole else 4.0 * facts.states,
        halo_bytes=4.0 * facts.halo,
        passes=2,
    )


def check_engines(linear: str | None, softmax: str | None) -> None:
    """UserError if the planner has no formula for an engine."""
    for flag, name, known in (("linear", linear, STATE_ENGINES), ("softmax", softmax, SOFTMAX_ENGINES)):
        if name is not None and name not in known:
            raise UserError(f"--{flag}-engine {name} is unknown: use one of {', '.join(known)}.")


def published_model(size: str, softmax: float, linear_engine: str | None, objective: str) -> CostModel:
    """Published constants as they stand, for a share of softmax layers."""
    return published(size, softmax, linear_engine or "scan", objective)
