"""Mamba-2.

Dao & Gu, "Transformers are SSMs" (arXiv 2405.21060), section 7 and the released block.

    paper                           here
    X (after the convolution)       x [T, H, V], V = head_dim (the paper's P)
    B, C                            B, C [T, G, K], K = state_size (the paper's N), shared by the H / G heads of a group
    A = -exp(A_log)                 one negative number a head, [H]
    dt = softplus(. + dt_bias)      dt [T, H]
    S_t = exp(dt A) S_t-1 + dt B^T x    ScalarDecay with q = C, k = B, v = dt x, log decay dt A; state [H, K, V]
    y = C S + D x                   y [T, H, V]

The state is stored key by value ([K, V]), the transpose of the released code's [P, N]. The gated norm is RMSNorm(y silu(z))
over groups of d_inner / G channels, so that no group depends on how heads are spread.

Legend: T tokens held here, D model width, H heads, G groups, K state width, V head width, d_inner = H * V.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..heads import Cut, share
from ..ops.affine import accumulate_dtype
from ..ops.convolution import causal_conv
from ..ops.scalar_decay import ScalarDecay
from ..sequence import SequenceShard
from .forgetting import WindowState, clipped, windowed_scan

if TYPE_CHECKING:
    from ..config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """Mamba-2."""

    state_size: int = 128
    """K, the paper's N."""

    head_dim: int = 64
    """V, the paper's P; expand * hidden_size must be a multiple of it."""

    expand: int = 2
    """d_inner / hidden_size."""

    num_groups: int = 1
    """G: heads of a group share B and C."""

    conv_width: int = 4
    """Taps of the causal depthwise convolution over x, B and C."""

    dt_min: float = 1e-3
    """Smallest initial step."""

    dt_max: float = 0.1
    """Largest initial step."""

    chunk: int = 64
    """Tokens of an inner chunk."""

    forget: float = 1.0
    """Against state collapse (`forgetting.py`): factor on the log decay; above 1 forgets more. Exact."""

    insert: float = 1.0
    """Against state collapse: factor on what a token writes; below 1 inserts less. Exact."""

    state_window: int | None = None
    """Against state collapse: what a token wrote is gone after so many tokens, for twice the work; never if left out. Exact."""

    state_norm_clip: float | None = None
    """Against state collapse: largest norm of a head's state where it enters a stream. Not exact: results depend on where
    streams and chunks (train.stream_tokens) are cut; they do not depend on the number of processes."""

    def __post_init__(self) -> None:
        for name, value in (("forget", self.forget), ("insert", self.insert), ("state_norm_clip", self.state_norm_clip)):
            if value is not None and not value > 0:
                raise UserError(f"mamba2.{name} must be above 0, but is {value}.")
        if self.state_window is not None and self.state_window < 1:
            raise UserError(f"mamba2.state_window must be at least 1 token, but is {self.state_window}.")


class Mamba2State(NamedTuple):
    """`conv` [conv_width - 1, d_inner + 2 G K], the last inputs of the convolution, `S` [H, K, V], and of a sliding window."""

    conv: Tensor | None
    S: Tensor | None
    window: WindowState | tuple[()] = ()


class Mamba2(nn.Module):
    """[T, D] -> [T, D]."""

    def __init__(self, hidden_size: int, config: Mamba2Config, num_layers: int = 1, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.config, self.num_layers, self.norm_eps = config, num_layers, norm_eps
        self.inner = config.expand * hidden_size
        if self.inner % config.head_dim:
            raise UserError(
                f"mamba2.head_dim {config.head_dim} must divide expand * hidden_size = {self.inner}; "
                f"try {math.gcd(self.inner, 64)}."
            )
        self.num_heads = self.inner // config.head_dim
        self.num_groups, self.first_group = config.num_groups, 0  # of the groups owned here, the first among all
        self.group_owners = 1
        if self.num_heads % config.num_groups:
            raise UserError(f"mamba2.num_groups {config.num_groups} must divide the {self.num_heads} heads.")
        shared = config.num_groups * config.state_size
        self.widths = (self.inner, self.inner + 2 * shared, self.num_heads)  # z | x B C | dt
        self.in_proj = nn.Linear(hidden_size, sum(self.widths), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(self.widths[1], config.conv_width))
        self.conv_bias = nn.Parameter(torch.empty(self.widths[1]))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.norm_weight = nn.Parameter(torch.empty(self.inner))
        self.out_proj = nn.Linear(self.inner, hidden_size, bias=False)
        for parameter in (self.conv_bias, self.A_log, self.dt_bias, self.D, self.norm_weight):
            parameter.no_weight_decay = True  # type: ignore[attr-defined]

    @classmethod
    def build(cls, model: ModelConfig, layer: int) -> Mamba2:
        return cls(model.hidden_size, model.mamba2, model.num_layers, model.norm_eps)

    @property
    def inexact(self) -> str | None:
        """Why results depend on where streams are cut; None if they do not."""
        clip = self.config.state_norm_clip
        return None if clip is None else f"mamba2.state_norm_clip {clip:g} clips states where they enter a stream"

    def reset_parameters(self) -> None:
        """As released: A ~ U(1, 16), dt log-uniform (floor 1e-4) through the inverse softplus, D = 1."""
        config = self.config
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()
        with torch.no_grad():
            self.out_proj.weight.div_(math.sqrt(self.num_layers))
            bound = config.conv_width**-0.5
            self.conv_weight.uniform_(-bound, bound)
            self.conv_bias.uniform_(-bound, bound)
            self.A_log.uniform_(1, 16).log_()
            low, high = math.log(config.dt_min), math.log(config.dt_max)
            dt = self.dt_bias.uniform_(low, high).exp().clamp_min(1e-4)
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
            self.D.fill_(1)
            self.norm_weight.fill_(1)

    def forward(self, x: Tensor, shard: SequenceShard, state: Mamba2State | None = None) -> tuple[Tensor, Mamba2State]:
        config = self.config
        z, xBC, dt = self.in_proj(x).split(self.widths, dim=-1)
        context, conv_state = shard.halo(xBC, config.conv_width - 1, None if state is None else state.conv)
        xBC = causal_conv(xBC, context, self.conv_weight, self.conv_bias, shard.segments, activation="silu")
        shared = self.num_groups * config.state_size
        x, B, C = xBC.split([self.inner, shared, shared], dim=-1)
        x = x.unflatten(-1, (self.num_heads, config.head_dim))  # [T, d_inner] -> [T, H, V]
        B, C = (tensor.unflatten(-1, (self.num_groups, config.state_size)) for tensor in (B, C))  # [T, G, K]
        dt = F.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias)
        log_decay = -config.forget * self.A_log.exp() * dt
        v = x * (config.insert * dt)[..., None].to(x.dtype)
        op, inputs, before = ScalarDecay(chunk=config.chunk), (C, B, v, log_decay), None
        if state is not None:
            before = clipped(state.S, config.state_norm_clip)
        window: WindowState | tuple[()] = ()
        if config.state_window is None:
            y, S = shard.scan(op, inputs, before)
        else:
            leaving = state.window or None if state is not None else None
            y, S, window = windowed_scan(shard, op, inputs, config.state_window, before, leaving)
        y = torch.addcmul(y, x, self.D[:, None].to(x.dtype))
        return self.out_proj(self.gated_norm(y.flatten(1), z, shard)), Mamba2State(conv_state, S, window)

    def gated_norm(self, y: Tensor, z: Tensor, shard: SequenceShard) -> Tensor:
        """`RMSNorm(y silu(z))` over each group's channels, [T, d_inner]."""
        gated = (y * F.silu(z)).unflatten(-1, (self.num_groups, -1))
        if self.group_owners == 1:
            normed = F.rms_norm(gated, gated.shape[-1:], eps=self.norm_eps)
        else:  # the group's other channels are elsewhere
            wide = gated.to(accumulate_dtype(y.dtype))
            squares = wide.new_zeros(len(wide), self.config.num_groups)
            own = slice(self.first_group, self.first_group + 1)
            squares[:, own] = wide.square().sum(-1)
            mean = shard.head_sum(squares)[:, own] / (self.group_owners * gated.shape[-1])  # [T, 1]
            normed = (wide * torch.rsqrt(mean + self.norm_eps)[..., None]).to(y.dtype)
        return normed.flatten(-2) * self.norm_weight.to(y.dtype)

    def cuts(self) -> dict[str, Cut]:
        head, group = (self.num_heads, self.config.head_dim), (self.num_groups, self.config.state_size)
        each = Cut(0, ((self.num_heads, 1),))
        return {
            "in_proj.weight": Cut(0, (head, head, group, group, (self.num_heads, 1))),  # z | x | B | C | dt
            "conv_weight": Cut(0, (head, group, group)),
            "conv_bias": Cut(0, (head, group, group)),
            "A_log": each,
            "dt_bias": each,
            "D": each,
            "norm_weight": Cut(0, (head,)),
            "out_proj.weight": Cut(1, (head,)),
        }

    def keep_heads(self, part: int, parts: int) -> None:
        self.group_owners = max(1, parts // self.num_groups)
        self.num_groups, self.first_group = share(self.num_groups, part, parts)
        self.num_heads, _ = share(self.num_heads, part, parts)
        self.inner = self.num_heads * self.config.head_dim
        self.widths = (self.inner, self.inner + 2 * self.num_groups * self.config.state_size, self.num_heads)

    def flops_per_token(self, seq_length: int) -> int:
        """Forward FLOPs of one token, the recurrence in its recurrent form (decay, outer product, add, read-out)."""
        weights = self.in_proj.weight.numel() + self.out_proj.weight.numel() + self.conv_weight.numel()
        scans = 1 if self.config.state_window is None else 2
        return 2 * weights + 5 * scans * self.inner * self.config.state_size
