"""DeltaNet: memory that is corrected instead of added to.

Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (arXiv 2406.06484), section 2 and
figure 4; the layer is flash-linear-attention's. Subclasses forget (`gated_deltanet.py`, `kimi_delta.py`).

    paper                                          here
    q_t, k_t = SiLU(conv(W x)) / ||.||_2           q, k [T, H, K]; x / sqrt(sum x^2 + 1e-6)
    v_t = SiLU(conv(W_v x))                        v [T, H, V]
    beta_t = sigmoid(W_beta x)                     beta [T, H]; twice that with negative_eigenvalues (arXiv 2411.12537)
    S_t = S_t-1 - beta_t (S_t-1 k_t - v_t) k_t^T   DeltaRule, state [H, K, V] (the transpose of the paper's)
    o_t = S_t q_t                                  o [T, H, V], q scaled by K ** -0.5
    RMSNorm(o) per head, W_o                       norm, out

What the references leave open: q, k and v are one projection and one convolution, so that one halo serves a layer; the output
gate, off in the paper, is an option (`output_gate`).

Legend: T tokens held here, D model width, G key heads, H value heads (G divides H), K key width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..heads import Cut, share
from ..norm import RMSNorm
from ..ops.affine import accumulate_dtype
from ..ops.convolution import causal_conv
from ..ops.delta_rule import DeltaRule, delta_inputs
from ..sequence import SequenceShard

if TYPE_CHECKING:
    from ..config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class DeltaRuleConfig:
    """What all delta-rule layers share."""

    head_dim: int | None = None
    """K, width of a key head; hidden_size / num_heads if left out."""

    expand_v: int = 1
    """V / K."""

    conv_width: int = 4
    """Taps of the causal depthwise convolution over q, k and v."""

    negative_eigenvalues: bool = False
    """beta in (0, 2) instead of (0, 1): transitions may flip a direction, which state tracking needs."""

    chunk: int = 64
    """Tokens of an inner chunk, a power of two."""

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.chunk & (self.chunk - 1):
            raise UserError(f"chunk must be a power of two for a delta rule, but is {self.chunk}; try 64.")


@dataclass(frozen=True, kw_only=True)
class DeltaNetConfig(DeltaRuleConfig):
    """DeltaNet."""

    output_gate: bool = False
    """Multiply the normed output by SiLU(W_g x)."""


class DeltaState(NamedTuple):
    """`conv` [conv_width - 1, 2 G K + H V], the last inputs of the convolution, and `S` [H, K, V]."""

    conv: Tensor | None
    S: Tensor | None


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`x / sqrt(sum x^2 + eps)` over the last axis, in at least float32; in the dtype of x."""
    wide = x.to(accumulate_dtype(x.dtype))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


class DeltaRuleLayer(nn.Module):
    """[T, D] -> [T, D]. A subclass says how memory decays (`log_decay`) and how the output is gated (`gated`).

    Args:
        num_heads: G. num_value_heads: H; G if None.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        config: DeltaRuleConfig,
        norm_eps: float = 1e-5,
        num_value_heads: int | None = None,
    ) -> None:
        super().__init__()
        self.num_key_heads, self.num_heads = num_heads, num_value_heads or num_heads
        if self.num_heads % num_heads:
            raise UserError(f"num_value_heads {self.num_heads} must be a multiple of num_heads {num_heads}.")
        self.width_k = config.head_dim or hidden_size // num_heads
        self.width_v = config.expand_v * self.width_k
        self.beta_scale, self.conv_width, self.chunk = 1 + config.negative_eigenvalues, config.conv_width, config.chunk
        self.widths = (num_heads * self.width_k, num_heads * self.width_k, self.num_heads * self.width_v)  # q | k | v
        self.qkv = nn.Linear(hidden_size, sum(self.widths), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(sum(self.widths), config.conv_width))
        self.beta = nn.Linear(hidden_size, self.num_heads, bias=False)
        self.norm = RMSNorm(self.width_v, eps=norm_eps)
        self.out = nn.Linear(self.widths[2], hidden_size, bias=False)
        self.norm.weight.no_weight_decay = True  # type: ignore[attr-defined]

    def reset_parameters(self) -> None:
        """Xavier-uniform with gain 2 ** -2.5, as the released linear-attention layers; the convolution as torch's."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, gain=2**-2.5)
        bound = self.conv_width**-0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        nn.init.ones_(self.norm.weight)

    def log_decay(self, x: Tensor) -> Tensor | None:
        """Log decay at each token, [T, H], or [T, H, K] per key channel; None for memory without decay."""
        return None

    def gated(self, o: Tensor, x: Tensor) -> Tensor:
        """The normed output of each head, gated if the model does, [T, H, V]."""
        return self.norm(o)

    def forward(self, x: Tensor, shard: SequenceShard, state: DeltaState | None = None) -> tuple[Tensor, DeltaState]:
        qkv = self.qkv(x)  # [T, D] -> [T, 2 G K + H V]
        context, conv_state = shard.halo(qkv, self.conv_width - 1, None if state is None else state.conv)
        qkv = causal_conv(qkv, context, self.conv_weight, None, shard.segments, activation="silu")
        q, k, v = qkv.split(self.widths, dim=-1)
        q, k = (l2_norm(tensor.unflatten(-1, (self.num_key_heads, self.width_k))) for tensor in (q, k))  # [T, G, K]
        if self.num_heads > self.num_key_heads:
            q, k = (tensor.repeat_interleave(self.num_heads // self.num_key_heads, dim=1) for tensor in (q, k))
        v = v.unflatten(-1, (self.num_heads, self.width_v))
        beta = self.beta_scale * self.beta(x).sigmoid()
        inputs = delta_inputs(q * self.width_k**-0.5, k, v, beta, self.log_decay(x))
        o, S = shard.scan(DeltaRule(self.chunk), inputs, None if state is None else state.S)
        return self.out(self.gated(o, x).flatten(1)), DeltaState(conv_state, S)

    def cuts(self) -> dict[str, Cut]:
        key, value = (self.num_key_heads, self.width_k), (self.num_heads, self.width_v)
        return {
            "qkv.weight": Cut(0, (key, key, value)),
            "conv_weight": Cut(0, (key, key, value)),
            "beta.weight": Cut(0, ((self.num_heads, 1),)),
            "out.weight": Cut(1, (value,)),
        }

    def keep_heads(self, part: int, parts: int) -> None:
        self.num_key_heads, _ = share(self.num_key_heads, part, parts)
        self.num_heads, _ = share(self.num_heads, part, parts)
        key = self.num_key_heads * self.width_k
        self.widths = (key, key, self.num_heads * self.width_v)

    def flops_per_token(self, seq_length: int) -> int:
        """Forward FLOPs of one token, the recurrence in its recurrent form (decay, read, correct, read-out)."""
        weights = sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))
        return 2 * (weights + self.conv_weight.numel()) + 7 * self.num_heads * self.width_k * self.width_v


class DeltaNet(DeltaRuleLayer):
    """[T, D] -> [T, D]."""

    def __init__(self, hidden_size: int, num_heads: int, config: DeltaNetConfig, norm_eps: float = 1e-5) -> None:
        super().__init__(hidden_size, num_heads, config, norm_eps)
        self.gate = nn.Linear(hidden_size, self.widths[2], bias=False) if config.output_gate else None

    @classmethod
    def build(cls, model: ModelConfig, layer: int) -> DeltaNet:
        return cls(model.hidden_size, model.num_heads, model.deltanet, model.norm_eps)

    def gated(self, o: Tensor, x: Tensor) -> Tensor:
        o = self.norm(o)
        return o if self.gate is None else o * F.silu(self.gate(x)).view_as(o)

    def cuts(self) -> dict[str, Cut]:
        gate = {} if self.gate is None else {"gate.weight": Cut(0, ((self.num_heads, self.width_v),))}
        return {**super().cuts(), **gate}
