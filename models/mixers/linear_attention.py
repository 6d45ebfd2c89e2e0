"""Basic linear attention, in the layer of the Linear-Llama3 family.

Katharopoulos et al., "Transformers are RNNs" (arXiv 2006.16236); layer as in LASP-2 (arXiv 2502.07563) and Linear-MoE
(arXiv 2503.05447): one fused projection, a feature map on q and k, an RMSNorm per head instead of a denominator, an output
gate, no RoPE.

    paper                         here
    Q, K, V                       q, k, v          [T, H, K], [T, H, K], [T, H, V]
    phi                           feature_map
    M_t = M_t-1 + k_t^T v_t       ScalarDecay, state [H, K, V]
    z_t = z_t-1 + k_t             an extra value column of ones (normalize=True)
    o_t = phi(q_t) M_t            out; divided by phi(q_t) . z_t if normalize

What the references leave open: the scale of q is K ** -0.5, as in nearly all code (an RMSNorm hides it but for eps).

Legend: T tokens held here, D model width, H heads, K = V = D / H.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..heads import Cut, share
from ..norm import RMSNorm
from ..ops.scalar_decay import ScalarDecay
from ..sequence import SequenceShard

if TYPE_CHECKING:
    from ..config import ModelConfig

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "elu+1": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "identity": lambda x: x,
    "softmax": lambda x: x.softmax(-1),
}


@dataclass(frozen=True, kw_only=True)
class LinearAttentionConfig:
    """Basic linear attention."""

    feature_map: str = "silu"
    """Map applied to q and k: silu, elu+1, relu, identity or softmax (over the head's width)."""

    normalize: bool = False
    """Divide by phi(q) . sum of phi(k), as the original does; the feature map must be positive."""

    chunk: int = 64
    """Tokens of an inner chunk."""

    def __post_init__(self) -> None:
        if self.feature_map not in FEATURE_MAPS:
            raise UserError(f"feature_map {self.feature_map!r} is none of {', '.join(FEATURE_MAPS)}.")
        if self.normalize and self.feature_map not in ("elu+1", "softmax"):
            raise UserError(f"normalize needs a positive feature map (elu+1 or softmax), not {self.feature_map!r}.")


class LinearState(NamedTuple):
    """[H, K, V]; with one more value column if normalised."""

    S: Tensor | None


class LinearAttention(nn.Module):
    """[T, D] -> [T, D]. A subclass gives the heads a decay (`log_decay`, [H]) or rotates q and k."""

    def __init__(self, hidden_size: int, num_heads: int, config: LinearAttentionConfig, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.config = num_heads, hidden_size // num_heads, config
        self.phi = FEATURE_MAPS[config.feature_map]
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.gate = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm = RMSNorm(self.head_dim, eps=norm_eps)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm.weight.no_weight_decay = True  # type: ignore[attr-defined]

    @classmethod
    def build(cls, model: ModelConfig, layer: int) -> LinearAttention:
        return cls(model.hidden_size, model.num_heads, model.linear_attention, model.norm_eps)

    def reset_parameters(self) -> None:
        """Xavier-uniform with gain 2 ** -2.5, as Linear-MoE initialises its linear layers."""
        for linear in (self.qkv, self.gate, self.out):
            nn.init.xavier_uniform_(linear.weight, gain=2**-2.5)
        nn.init.ones_(self.norm.weight)

    def log_decay(self) -> Tensor | None:
        """Constant log decay of each head, [H]; None for memory without decay."""
        return None

    def rotate(self, x: Tensor, shard: SequenceShard) -> Tensor:
        """A position-dependent rotation of q and k, [T, H, K] -> [T, H, K]."""
        return x

    def forward(self, x: Tensor, shard: SequenceShard, state: LinearState | None = None) -> tuple[Tensor, LinearState]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(1)  # [T, 3 D] -> [T, H, K] each
        q, k = self.rotate(self.phi(q), shard) * self.head_dim**-0.5, self.rotate(self.phi(k), shard)
        if self.config.normalize:
            v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)  # the last column sums the keys
        op = ScalarDecay(self.log_decay(), chunk=self.config.chunk)
        o, S = shard.scan(op, (q, k, v, None), None if state is None else state.S)
        if self.config.normalize:
            o = o[..., :-1] / o[..., -1:].clamp_min(torch.finfo(o.dtype).eps)
        o = self.norm(o) * F.silu(self.gate(x)).unflatten(-1, (self.num_heads, self.head_dim))
        return self.out(o.flatten(1)), LinearState(S)  # [T, H, V] -> [T, D]

    def cuts(self) -> dict[str, Cut]:
        heads = (self.num_heads, self.head_dim)
        return {
            "qkv.weight": Cut(0, (heads, heads, heads)),
            "gate.weight": Cut(0, (heads,)),
            "out.weight": Cut(1, (heads,)),
        }

    def keep_heads(self, part: int, parts: int) -> None:
        self.num_heads, _ = share(self.num_heads, part, parts)

    def flops_per_token(self, seq_length: int) -> int:
        """Forward FLOPs of one token, the recurrence in its recurrent form (decay, outer product, add, read-out)."""
        weights = sum(linear.weight.numel() for linear in (self.qkv, self.gate, self.out))
        return 2 * weights + 5 * self.num_heads * self.head_dim**2
