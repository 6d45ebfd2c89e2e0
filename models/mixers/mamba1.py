"""Mamba-1.

Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752), algorithm 2 and the released
block.

    paper                            here
    x (after the convolution)        x [T, E], E = expand * D
    A = -exp(A_log)                  A [E, K], one negative number per channel and state (the paper's D x N)
    B, C = s_B(x), s_C(x)            B, C [T, K], parts of x_proj
    Delta = softplus(s_Delta(x))     dt [T, E]: x_proj to dt_rank numbers, then dt_proj
    h_t = exp(dt A) h + dt B x       SelectiveScan, state [E, K]; B by Euler, not by zero-order hold, as released
    y = C h + D x                    y [T, E]

A enters the scan as -exp(A_log), an activation: its gradient on a rank is that rank's share, like a parameter's. There is no
norm inside the block. What the reference leaves open: dt's bias is part of softplus's argument in the parameter's dtype.

Legend: T tokens held here, D model width, E inner width, K states of a channel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..heads import Cut, share
from ..ops.convolution import causal_conv
from ..ops.selective_scan import SelectiveScan
from ..sequence import SequenceShard

if TYPE_CHECKING:
    from ..config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Mamba1Config:
    """Mamba-1."""

    state_size: int = 16
    """K, the paper's N: states of a channel."""

    expand: int = 2
    """Inner width / hidden_size."""

    conv_width: int = 4
    """Taps of the causal depthwise convolution over x."""

    dt_rank: int | None = None
    """Width of the step's low-rank projection; hidden_size / 16, rounded up, if left out."""

    dt_min: float = 1e-3
    """Smallest initial step."""

    dt_max: float = 0.1
    """Largest initial step."""

    chunk: int = 32
    """Tokens of an inner chunk."""


class Mamba1State(NamedTuple):
    """`conv` [conv_width - 1, E], the last inputs of the convolution, and `S` [E, K]."""

    conv: Tensor | None
    S: Tensor | None


class Mamba1(nn.Module):
    """[T, D] -> [T, D]."""

    def __init__(self, hidden_size: int, config: Mamba1Config, num_layers: int = 1) -> None:
        super().__init__()
        self.config, self.num_layers = config, num_layers
        self.inner = config.expand * hidden_size
        self.dt_rank = config.dt_rank if config.dt_rank is not None else -(-hidden_size // 16)
        self.in_proj = nn.Linear(hidden_size, 2 * self.inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(self.inner, config.conv_width))
        self.conv_bias = nn.Parameter(torch.empty(self.inner))
        self.x_proj = nn.Linear(self.inner, self.dt_rank + 2 * config.state_size, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.inner, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(self.inner))
        self.A_log = nn.Parameter(torch.empty(self.inner, config.state_size))
        self.D = nn.Parameter(torch.empty(self.inner))
        self.out_proj = nn.Linear(self.inner, hidden_size, bias=False)
        for parameter in (self.conv_bias, self.A_log, self.dt_bias, self.D):
            parameter.no_weight_decay = True  # type: ignore[attr-defined]

    @classmethod
    def build(cls, model: ModelConfig, layer: int) -> Mamba1:
        return cls(model.hidden_size, model.mamba1, model.num_layers)

    def reset_parameters(self) -> None:
        """As released: A = -(1 .. K) (S4D-real), dt log-uniform (floor 1e-4) through the inverse softplus, D = 1."""
        config = self.config
        for linear in (self.in_proj, self.x_proj, self.out_proj):
            linear.reset_parameters()
        with torch.no_grad():
            self.out_proj.weight.div_(math.sqrt(self.num_layers))
            bound = config.conv_width**-0.5
            self.conv_weight.uniform_(-bound, bound)
            self.conv_bias.uniform_(-bound, bound)
            self.dt_proj.weight.uniform_(-(self.dt_rank**-0.5), self.dt_rank**-0.5)
            dt = self.dt_bias.uniform_(math.log(config.dt_min), math.log(config.dt_max)).exp().clamp_min(1e-4)
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
            self.A_log.copy_(torch.arange(1, config.state_size + 1, device=self.A_log.device).log().expand_as(self.A_log))
            self.D.fill_(1)

    def forward(self, x: Tensor, shard: SequenceShard, state: Mamba1State | None = None) -> tuple[Tensor, Mamba1State]:
        config = self.config
        x, z = self.in_proj(x).chunk(2, dim=-1)  # [T, D] -> [T, E] each
        context, conv_state = shard.halo(x, config.conv_width - 1, None if state is None else state.conv)
        x = causal_conv(x, context, self.conv_weight, self.conv_bias, shard.segments, activation="silu")
        dt, B, C = shard.head_sum(self.x_proj(x)).split([self.dt_rank, config.state_size, config.state_size], dim=-1)
        dt = F.softplus(self.dt_proj(dt).to(self.dt_bias.dtype) + self.dt_bias)  # [T, dt_rank] -> [T, E]
        op = SelectiveScan(chunk=config.chunk)
        y, S = shard.scan(op, (x, dt, -self.A_log.exp(), B, C), None if state is None else state.S)
        y = torch.addcmul(y, x, self.D.to(x.dtype)) * F.silu(z)
        return self.out_proj(y), Mamba1State(conv_state, S)

    def cuts(self) -> dict[str, Cut]:
        channels = (self.inner, 1)
        names = ("conv_weight", "conv_bias", "dt_proj.weight", "dt_bias", "A_log", "D")
        return {
            "in_proj.weight": Cut(0, (channels, channels)),
            **{name: Cut(0, (channels,)) for name in names},
            "x_proj.weight": Cut(1, (channels,)),
            "out_proj.weight": Cut(1, (channels,)),
        }

    def keep_heads(self, part: int, parts: int) -> None:
        self.inner, _ = share(self.inner, part, parts)

    def flops_per_token(self, seq_length: int) -> int:
        """Forward FLOPs of one token, the recurrence in its recurrent form (decay 2, outer product and add 3, read-out 2)."""
        linears = (self.in_proj, self.x_proj, self.dt_proj, self.out_proj)
        weights = sum(linear.weight.numel() for linear in linears) + self.conv_weight.numel()
        return 2 * weights + 7 * self.inner * self.config.state_size
