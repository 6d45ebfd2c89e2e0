"""Gated linear attention (GLA).

Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training" (arXiv 2312.06635), section 4.

    paper                                       here
    Q, K, V                                     q, k, v   [T, H, K], [T, H, K], [T, H, V]
    alpha_t = sigmoid(x W1 W2 + b) ** (1/tau)   exp(log_decay), [T, H, K]; W1, W2: decay_down, decay_up; tau: gate_normalizer
    S_t = diag(alpha_t) S_t-1 + k_t^T v_t (3)   DiagonalDecay, state [H, K, V]: the decay acts on the key axis
    o_t = q_t S_t / sqrt(K)                     o
    r_t = swish(x W_r + b_r)                    F.silu(gate(x)); without b_r, as in all released code
    y_t = (r_t * LN(o_t)) W_o                   the norm is an RMSNorm per head, as released

What the references leave open: the paper's widths are key D / 2 and value D; the Linear-Llama3 family (LASP-2, arXiv
2502.07563, and Linear-MoE) takes D for both, and so do the defaults here. The paper has no feature map on q and k, the family
has SiLU: `feature_map` chooses, and the paper's is the default.

Legend: T tokens held here, D model width, H heads, K key width of a head, V value width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..heads import Cut, share
from ..norm import RMSNorm
from ..ops.affine import accumulate_dtype
from ..ops.diagonal_decay import DiagonalDecay
from ..sequence import SequenceShard
from .linear_attention import FEATURE_MAPS

if TYPE_CHECKING:
    from ..config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class GLAConfig:
    """Gated linear attention."""

    expand_k: float = 1.0
    """Key width of all heads over the hidden size; 0.5 in the paper."""

    expand_v: float = 1.0
    """Value width of all heads over the hidden size."""

    feature_map: str = "identity"
    """Map applied to q and k: identity (the paper), silu (the Linear-Llama3 family), elu+1, relu or softmax."""

    gate_low_rank: int = 16
    """Rank of the decay's projection."""

    gate_normalizer: float = 16.0
    """tau: divides the log of the sigmoid, so that a fresh gate remembers some tens of tokens."""

    chunk: int = 64
    """Tokens of an inner chunk; a power of two."""

    def __post_init__(self) -> None:
        if self.feature_map not in FEATURE_MAPS:
            raise UserError(f"gla.feature_map {self.feature_map!r} is none of {', '.join(FEATURE_MAPS)}.")
        check_chunk("gla", self.chunk)


def check_chunk(mixer: str, chunk: int) -> None:
    """Refuse a chunk that a diagonal decay cannot halve."""
    if chunk < 1 or chunk & (chunk - 1):
        raise UserError(f"{mixer}.chunk must be a power of two, but is {chunk}; try 64.")


class GLAState(NamedTuple):
    """[H, K, V]."""

    S: Tensor | None


class GLA(nn.Module):
    """[T, D] -> [T, D]."""

    def __init__(self, hidden_size: int, num_heads: int, config: GLAConfig, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.num_heads, self.config = num_heads, config
        self.phi = FEATURE_MAPS[config.feature_map]
        key, value = int(hidden_size * config.expand_k), int(hidden_size * config.expand_v)
        for name, width in (("expand_k", key), ("expand_v", value)):
            if width < 1 or width % num_heads:
                raise UserError(
                    f"gla.{name} {getattr(config, name)} makes a width of {width}, which the {num_heads} heads "
                    "cannot share; try 1.0."
                )
        self.widths = key, key, value
        self.key_dim, self.value_dim = key // num_heads, value // num_heads
        self.qkv = nn.Linear(hidden_size, sum(self.widths), bias=False)
        self.decay_down = nn.Linear(hidden_size, config.gate_low_rank, bias=False)
        self.decay_up = nn.Linear(config.gate_low_rank, key)
        self.gate = nn.Linear(hidden_size, value, bias=False)
        self.norm = RMSNorm(self.value_dim, eps=norm_eps)
        self.out = nn.Linear(value, hidden_size, bias=False)
        for parameter in (self.decay_up.bias, self.norm.weight):
            parameter.no_weight_decay = True  # type: ignore[attr-defined]

    @classmethod
    def build(cls, model: ModelConfig, layer: int) -> GLA:
        return cls(model.hidden_size, model.num_heads, model.gla, model.norm_eps)

    def linears(self) -> tuple[nn.Linear, ...]:
        return self.qkv, self.decay_down, self.decay_up, self.gate, self.out

    def reset_parameters(self) -> None:
        """Xavier-uniform with gain 2 ** -2.5, biases zero, as released."""
        for linear in self.linears():
            nn.init.xavier_uniform_(linear.weight, gain=2**-2.5)
        nn.init.zeros_(self.decay_up.bias)
        nn.init.ones_(self.norm.weight)

    def forward(self, x: Tensor, shard: SequenceShard, state: GLAState | None = None) -> tuple[Tensor, GLAState]:
        q, k, v = self.qkv(x).split(self.widths, dim=-1)
        q, k = (self.phi(tensor.unflatten(-1, (self.num_heads, self.key_dim))) for tensor in (q, k))  # [T, H, K]
        v = v.unflatten(-1, (self.num_heads, self.value_dim))  # [T, H, V]
        decay = self.decay_up(self.decay_down(x)).unflatten(-1, (self.num_heads, self.key_dim))
        log_decay = F.logsigmoid(decay.to(accumulate_dtype(decay.dtype))) / self.config.gate_normalizer
        op = DiagonalDecay(chunk=self.config.chunk)
        o, S = shard.scan(op, (q * self.key_dim**-0.5, k, v, log_decay), None if state is None else state.S)
        o = self.norm(o) * F.silu(self.gate(x)).unflatten(-1, (self.num_heads, self.value_dim))
        return self.out(o.flatten(1)), GLAState(S)  # [T, H, V] -> [T, D]

    def cuts(self) -> dict[str, Cut]:
        key, value = (self.num_heads, self.key_dim), (self.num_heads, self.value_dim)
        return {
            "qkv.weight": Cut(0, (key, key, value)),
            "decay_up.weight": Cut(0, (key,)),
            "decay_up.bias": Cut(0, (key,)),
            "gate.weight": Cut(0, (value,)),
            "out.weight": Cut(1, (value,)),
        }

    def keep_heads(self, part: int, parts: int) -> None:
        self.num_heads, _ = share(self.num_heads, part, parts)
        key = self.num_heads * self.key_dim
        self.widths = key, key, self.num_heads * self.value_dim

    def flops_per_token(self, seq_length: int) -> int:
        """Forward FLOPs of one token, the recurrence in its recurrent form (decay, outer product, add, read-out)."""
        weights = sum(linear.weight.numel() for linear in self.linears())
        return 2 * weights + 5 * self.num_heads * self.key_dim * self.value_dim
