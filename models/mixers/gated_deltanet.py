"""Gated DeltaNet: the delta rule with a decay per head.

Yang, Kautz & Hatamizadeh, "Gated Delta Networks" (arXiv 2412.06464), equation 10 and section 3.4; Qwen3-Next's linear layer.

    paper                                                     here
    q_t, k_t, v_t, beta_t                                     as in `deltanet.py`
    alpha_t = exp(-exp(A_log) softplus(W_a x + dt_bias))      exp(log_decay), [T, H]; Mamba-2's gate
    S_t = S_t-1 alpha_t (I - beta k_t k_t^T) + beta v_t k_t^T    DeltaRule, state [H, K, V] (the paper's transposed)
    o = W_o (RMSNorm(o) SiLU(W_g x))                          gated

Decay comes before the correction: what is read at k_t has decayed already. With `num_value_heads` H a multiple of the key
heads G, key head g serves value heads `g H / G .. (g + 1) H / G` (Qwen3-Next). The published widths are head_dim = 3 D / 4 G
and expand_v = 2. Weight decay exempts A_log, dt_bias and the norm.

Legend: T tokens held here, D model width, G key heads, H value heads, K key width, V value width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..heads import Cut
from .deltanet import DeltaRuleConfig, DeltaRuleLayer

if TYPE_CHECKING:
    from ..config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig(DeltaRuleConfig):
    """Gated DeltaNet."""

    num_value_heads: int | None = None
    """H, a multiple of num_heads; num_heads if left out."""

    dt_min: float = 1e-3
    """Smallest initial step."""

    dt_max: float = 0.1
    """Largest initial step."""


def init_steps_(bias: Tensor, low: float, high: float) -> None:
    """Fill in place so that softplus(bias) is log-uniform in [low, high], at least 1e-4."""
    dt = bias.uniform_(math.log(low), math.log(high)).exp().clamp_min(1e-4)
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))


class GatedDeltaNet(DeltaRuleLayer):
    """[T, D] -> [T, D]."""

    def __init__(self, hidden_size: int, num_heads: int, config: GatedDeltaNetConfig, norm_eps: float = 1e-5) -> None:
        super().__init__(hidden_size, num_heads, config, norm_eps, config.num_value_heads)
        self.config = config
        self.decay = nn.Linear(hidden_size, self.num_heads, bias=False)
        self.gate = nn.Linear(hidden_size, self.widths[2], bias=False)
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        for parameter in (self.A_log, self.dt_bias):
            parameter.no_weight_decay = True  # type: ignore[attr-defined]

    @classmethod
    def build(cls, model: ModelConfig, layer: int) -> GatedDeltaNet:
        return cls(model.hidden_size, model.num_heads, model.gated_deltanet, model.norm_eps)

    def reset_parameters(self) -> None:
        """As released: A ~ U(0, 16), kept off 0 for its logarithm, and dt log-uniform in [dt_min, dt_max]."""
        super().reset_parameters()
        with torch.no_grad():
            self.A_log.uniform_(1e-2, 16).log_()
            init_steps_(self.dt_bias, self.config.dt_min, self.config.dt_max)

    def log_decay(self, x: Tensor) -> Tensor:
        return -self.A_log.exp() * F.softplus(self.decay(x).to(self.dt_bias.dtype) + self.dt_bias)

    def gated(self, o: Tensor, x: Tensor) -> Tensor:
        return self.norm(o) * F.silu(self.gate(x)).view_as(o)

    def cuts(self) -> dict[str, Cut]:
        each = Cut(0, ((self.num_heads, 1),))
        own = {"decay.weight": each, "gate.weight": Cut(0, ((self.num_heads, self.width_v),)), "A_log": each, "dt_bias": each}
        return {**super().cuts(), **own}
