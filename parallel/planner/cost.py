"""Predicted time and memory of a group: a sum over layers of a term by kind and engine.

Legend: `s` tokens of a document, `S` tokens of a group, `d` degree, `v` bandwidth, `L` latency, `Z` bytes of a layer's
state.

    time(group) = bias + (1/d) sum_layers sum_documents (quadratic * pairs(s) + linear * s) + communication(S, d) +
    exchange(d)

`bias` is paid once a micro-batch. All planning is done in integer microseconds, so that no sum depends on its order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from longhaul.models.errors import UserError
from longhaul.parallel.planner.cluster import Cluster, Kind

MICROSECOND = 1e-6
SOFTMAX_ENGINES = ("head_split", "ring", "all_gather")
STATE_ENGINES = ("head_split", "all_gather", "scan", "ring")


@dataclass(frozen=True)
class LayerCost:
    """A number of equal layers.

    Attributes:
        kind: `softmax` or `linear` (anything with a carried state).
        layers: how many.
        engine: softmax: `head_split` (all-to-all), `ring`, `all_gather` (keys and values travel);
            linear: `head_split`, or `all_gather`, `scan`, `ring` of states, which no length enters.
        linear: seconds a token, one layer, on one rank.
        quadratic: seconds a token squared, one layer (softmax).
        window: tokens a query sees (softmax), None: all before it.
        token_bytes: bytes a token puts on the wire, one layer, all passes (not for state engines).
        state_bytes: bytes of one state (state engines).
        halo_bytes: bytes of the convolution's halo a layer, sent to one neighbour.
        passes: exchanges a step (forward, recomputed forward, backward); fitted, any number.
        max_degree: most ranks the engine can use (heads, for `head_split`).
    """

    kind: str
    layers: int
    engine: str
    linear: float
    quadratic: float = 0.0
    window: int | None = None
    token_bytes: float = 0.0
    state_bytes: float = 0.0
    halo_bytes: float = 0.0
    passes: float = 3
    max_degree: int | None = None

    def __post_init__(self) -> None:
        engines = {"softmax": SOFTMAX_ENGINES, "linear": STATE_ENGINES}.get(self.kind)
        if engines is None:
            raise UserError(f"Unknown kind of layer {self.kind!r} in the cost model: use softmax or linear.")
        if self.engine not in engines:
            raise UserError(f"Unknown engine {self.engine!r} of {self.kind} layers: use one of {', '.join(engines)}.")
        if min(self.linear, self.quadratic, self.token_bytes, self.state_bytes, self.halo_bytes) < 0:
            raise UserError(f"A cost of the {self.kind} layers is negative: calibrate again with more lengths.")

    def compute(self, lengths: np.ndarray) -> np.ndarray:
        """Seconds of each document on one rank of speed 1. [documents] -> [documents]"""
        s = lengths.astype(np.float64)
        pairs = (
            s * s if self.window is None else np.where(s <= self.window, s * s, self.window * (2.0 * s - self.window))
        )
        return self.layers * (self.quadratic * pairs + self.linear * s)

    def per_token(self, cluster: Cluster, degree: int, link_speed: float) -> float:
        """Seconds of communication a token of the group costs."""
        if degree == 1 or (self.kind == "linear" and self.engine != "head_split"):
            return 0.0
        if self.engine == "head_split":
            return self.layers * self.token_bytes / (degree * cluster.exchange_bandwidth(degree) * link_speed)
        received = self.token_bytes * (degree - 1) / degree
        return self.layers * received / (cluster.link(degree).bandwidth * link_speed)

    def per_group(self, cluster: Cluster, degree: int, link_speed: float) -> float:
        """Seconds of communication that do not depend on lengths."""
        if degree == 1:
            return 0.0
        link = cluster.link(degree)
        bandwidth = link.bandwidth * link_speed
        halo = self.passes * (link.latency + self.halo_bytes / bandwidth) if self.halo_bytes else 0.0
        if self.kind == "softmax" or self.engine == "head_split":
            return self.layers * halo
        state = self.state_bytes / bandwidth
        if self.engine == "all_gather":
            once = link.latency + (degree - 1) * state
        elif self.engine == "scan":
            once = math.ceil(math.log2(degree)) * (link.latency + state)
        else:
            once = (degree - 1) * (link.latency + state)
        return self.layers * (self.passes * once + halo)


@dataclass(frozen=True)
class CostModel:
    """Time and memory of a model.

    Attributes:
        layers: terms, one a kind of layer.
        bias: seconds a micro-batch costs whatever is in it.
        bytes_per_token: activation bytes a token keeps on its rank.
        fixed_bytes: bytes a rank holds whatever it computes (model states, recurrent states kept).
        objective: `sum` (a group passes through its layers freely) or `split` (a barrier over all groups between kinds
            of layer).
    """

    layers: tuple[LayerCost, ...]
    bias: float
    bytes_per_token: float
    fixed_bytes: float = 0.0
    objective: str = "sum"

    def __post_init__(self) -> None:
        if self.objective not in ("sum", "split"):
            raise UserError(f"Unknown objective {self.objective!r}: use sum or split.")
        if not self.layers or self.bytes_per_token <= 0 or self.bias < 0:
            raise UserError("A cost model needs layers, a bias of at least 0 and bytes_per_token above 0.")

    @property
    def max_degree(self) -> int | None:
        """Most ranks that every layer's engine can use."""
        limits = [layer.max_degree for layer in self.layers if layer.max_degree is not None]
        return min(limits) if limits else None

    @property
    def parts(self) -> tuple[tuple[LayerCost, ...], ...]:
        """Layers between barriers: all of them (`sum`), or one entry a kind (`split`)."""
        if self.objective == "sum":
            return (self.layers,)
        kinds = dict.fromkeys(layer.kind for layer in self.layers)
        return tuple(tuple(layer for layer in self.layers if layer.kind == kind) for kind in kinds)

    def bias_time(self) -> int:
        """Bias in integer microseconds."""
        return round(self.bias / MICROSECOND)

    def tokens_per_rank(self, cluster: Cluster) -> int:
        """Tokens that fit on a rank."""
        tokens = int((cluster.memory - self.fixed_bytes) // self.bytes_per_token)
        if tokens < 1:
            raise UserError(
                f"A rank has {cluster.memory:.3g} bytes and the model states take {self.fixed_bytes:.3g}, which leaves "
                "no room for a token: shard the model states over more ranks or use ranks with more memory."
            )
        return tokens

    def memory(self, tokens: int) -> float:
        """Bytes on a rank that holds `tokens`."""
        return self.fixed_bytes + tokens * self.bytes_per_token

    def document_time(
        self, lengths: np.ndarray, cluster: Cluster, kind: Kind, layers: tuple[LayerCost, ...]
    ) -> np.ndarray:
        """Integer microseconds, at least one, that each document adds to a group of this kind. [documents] -> [documents]"""
        seconds = np.zeros(len(lengths), np.float64)
        for layer in layers:
            seconds += layer.compute(lengths) * (kind.slowdown / kind.degree)
            seconds += lengths * layer.per_token(cluster, kind.degree, kind.link_speed)
        return np.maximum(np.rint(seconds / MICROSECOND).astype(np.int64), 1)  # tiny models: nothing is free

    def group_time(self, cluster: Cluster, kind: Kind, layers: tuple[LayerCost, ...]) -> int:
        """Integer microseconds a group of this kind costs whatever it holds (without the bias)."""
        return round(sum(layer.per_group(cluster, kind.degree, kind.link_speed) for layer in layers) / MICROSECOND)


# Published constants (FlexSP, A100-40GB): seconds a token squared, seconds a token, bias, bytes a token.
PUBLISHED = {
    "7B": (5.128e-9, 0.1840e-3, 0.629, 4.48e6),
    "13B": (9.285e-9, 0.3060e-3, 1.133, 4.22e6),
    "30B": (15.43e-9, 0.8036e-3, 2.789, 3.42e6),
}
PUBLISHED_ALL_TO_ALL = {
    2: 119.5e9,
    4: 104.1e9,
    8: 96.5e9,
    16: 10.3e9,
    32: 5.9e9,
    64: 4.9e9,
    128: 4.5e9,  # from here on extrapolated
    256: 4.3e9,
    512: 4.2e9,
    1024: 4.1e9,
}
PUBLISHED_TRAFFIC = 2.0e6  # bytes a token exchanges in all layers and passes (7B), from the reported shares of time
LAYERS = 32


def published(
    model: str = "7B", softmax: float = 1.0, engine: str = "scan", objective: str = "sum", tokens: int = 6400
) -> CostModel:
    """Cost model with published constants; `softmax` is the share of softmax layers, the rest are linear with `engine`.

    A linear layer costs 8 % more a token than the linear part of a softmax layer, and its state has 2 MB. `fixed_bytes`
    is chosen such that a rank with 30 GB holds `tokens` tokens.
    """
    if model not in PUBLISHED:
        raise UserError(f"No published constants for {model!r}: use one of {', '.join(PUBLISHED)}.")
    quadratic, linear, bias, bytes_per_token = PUBLISHED[model]
    attention = LayerCost(
        "softmax",
        round(LAYERS * softmax),
        "head_split",
        linear=linear / LAYERS,
        quadratic=quadratic / LAYERS,
        token_bytes=PUBLISHED_TRAFFIC / LAYERS,
    )
    recurrent = LayerCost(
        "linear",
        LAYERS - attention.layers,
        engine,
        linear=1.08 * linear / LAYERS,
        token_bytes=PUBLISHED_TRAFFIC / LAYERS if engine == "head_split" else 0.0,
        state_bytes=0.0 if engine == "head_split" else 2.0 * 2**20,
    )
    layers = tuple(layer for layer in (attention, recurrent) if layer.layers)
    return CostModel(layers, bias, bytes_per_token, 30e9 - tokens * bytes_per_token, objective)
