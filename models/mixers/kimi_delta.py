"""Kimi Delta Attention: the delta rule with a decay per key channel.

Kimi Team, "Kimi Linear" (arXiv 2510.26692), section 3 and equation 1.

    paper                                                     here
    q_t, k_t, v_t, beta_t                                     as in `deltanet.py`
    S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_t-1 + beta_t k_t v_t^T    DeltaRule, state [H, K, V]
    alpha_t, from W_alpha_up W_alpha_down x                   exp(log_decay), [T, H, K]; decay_down, decay_up
    o = W_o (Sigmoid(W_g_up W_g_down x) RMSNorm(o))           gate_down, gate_up

What the paper leaves open, as in the released code: log alpha = -exp(A_log) softplus(. + dt_bias) with A_log per head and
dt_bias per channel, A ~ U(1, 16), dt log-uniform in [1e-3, 1e-1]; both low ranks are a head's width; no biases in the gate.
An earlier release starts dt_bias at zero, which forgets within a few tokens.

Legend: T tokens held here, D model width, H heads, K key width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..heads import Cut
from .deltanet import DeltaRuleConfig, DeltaRuleLayer
from .gated_deltanet import init_steps_

if TYPE_CHECKING:
    from ..config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class KimiDeltaConfig(DeltaRuleConfig):
    """Kimi Delta Attention."""

    dt_min: float = 1e-3
    """Smallest initial step."""

    dt_max: float = 0.1
    """Largest initial step."""


class KimiDelta(DeltaRuleLayer):
    """[T, D] -> [T, D]."""

    def __init__(self, hidden_size: int, num_heads: int, config: KimiDeltaConfig, norm_eps: float = 1e-5) -> None:
        super().__init__(hidden_size, num_heads, config, norm_eps)
        self.config = config
        self.decay_down = nn.Linear(hidden_size, self.width_v, bias=False)
        self.decay_up = nn.Linear(self.width_v, self.widths[0], bias=False)
        self.gate_down = nn.Linear(hidden_size, self.width_v, bias=False)
        self.gate_up = nn.Linear(self.width_v, self.widths[2], bias=False)
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.widths[0]))
        for parameter in (self.A_log, self.dt_bias):
            parameter.no_weight_decay = True  # type: ignore[attr-defined]

    @classmethod
    def build(cls, model: ModelConfig, layer: int) -> KimiDelta:
        return cls(model.hidden_size, model.num_heads, model.kimi_delta, model.norm_eps)

    def reset_parameters(self) -> None:
        """As released: A ~ U(1, 16), dt log-uniform in [dt_min, dt_max]."""
        super().reset_parameters()
        with torch.no_grad():
            self.A_log.uniform_(1, 16).log_()
            init_steps_(self.dt_bias, self.config.dt_min, self.config.dt_max)

    def log_decay(self, x: Tensor) -> Tensor:
        dt = F.softplus(self.decay_up(self.decay_down(x)).to(self.dt_bias.dtype) + self.dt_bias)  # [T, H K]
        return -self.A_log.exp()[:, None] * dt.unflatten(-1, (self.num_heads, self.width_k))

    def gated(self, o: Tensor, x: Tensor) -> Tensor:
        return self.norm(o) * self.gate_up(self.gate_down(x)).sigmoid().view_as(o)

    def cuts(self) -> dict[str, Cut]:
        key, value = Cut(0, ((self.num_heads, self.width_k),)), Cut(0, ((self.num_heads, self.width_v),))
        own = {"decay_up.weight": key, "gate_up.weight": value, "A_log": Cut(0, ((self.num_heads, 1),)), "dt_bias": key}
        return {**super().cuts(), **own}
