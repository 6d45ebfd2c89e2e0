"""Based: linear attention with the second-order Taylor expansion of exp as its kernel.

Arora et al., "Simple linear attention language models balance the recall-throughput tradeoff" (arXiv 2402.18668), section 4.

    paper                                              here
    d' (feature dimension)                             F = feature_dim, 16
    phi(q) . phi(k) = 1 + s + s^2 / 2, s = q . k / sqrt(d')    taylor_features, 1 + F + F (F + 1) / 2 = 153 columns
    KV-state s_t = s_t-1 + phi(k_t)^T v_t              ScalarDecay without decay, state [H, 153, V + 1]
    K-state z_t = z_t-1 + phi(k_t)                     the last value column, of ones
    y_t = phi(q_t) s_t / (phi(q_t) z_t)                out

The paper writes all F * F products x_i x_j (1 + 16 + 256 = 273 columns). x_i x_j and x_j x_i are the same number, so each pair
is kept once, times sqrt(2): the kernel is the same and the state is 44 % smaller. The kernel is never below one half
(1 + s + s^2 / 2 = ((1 + s)^2 + 1) / 2), so the denominator needs no epsilon.

What the references leave open: the paper's models mix these layers with sliding-window attention and short convolutions; here
the pattern of the model does the first. There is no gate and no norm, as published. Matrices start Xavier-uniform with gain
2 ** -2.5, as in Linear-MoE.

Legend: T tokens held here, D model width, H heads, V = D / H, F feature dimension, K columns of the feature map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..heads import Cut, share
from ..ops.scalar_decay import ScalarDecay
from ..sequence import SequenceShard

if TYPE_CHECKING:
    from ..config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class BasedConfig:
    """Based."""

    feature_dim: int = 16
    """F: width of a head's q and k before the feature map, which squares it."""

    chunk: int = 64
    """Tokens of an inner chunk."""

    def __post_init__(self) -> None:
        if self.feature_dim < 1:
            raise UserError(f"feature_dim must be at least 1, but is {self.feature_dim}.")


class BasedState(NamedTuple):
    """[H, K, V + 1]."""

    S: Tensor | None


def square_features(x: Tensor) -> Tensor:
    """Columns whose product is the square of the product: f(x) . f(y) = (x . y)^2; [..., F] -> [..., F (F + 1) / 2]."""
    scaled = x * 2**0.5
    pairs = [scaled[..., i : i + 1] * x[..., i + 1 :] for i in range(x.shape[-1] - 1)]
    return torch.cat([x * x, *pairs], dim=-1)


def taylor_features(x: Tensor) -> Tensor:
    """f(x) . f(y) = 1 + s + s^2 / 2 with s = x . y / sqrt(F); [..., F] -> [..., 1 + F + F (F + 1) / 2]."""
    x = x * x.shape[-1] ** -0.25
    return torch.cat([torch.ones_like(x[..., :1]), x, square_features(x) * 2**-0.5], dim=-1)


class Based(nn.Module):
    """[T, D] -> [T, D]. A subclass has another kernel."""

    def __init__(self, hidden_size: int, num_heads: int, config: BasedConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.config = num_heads, hidden_size // num_heads, config
        features = num_heads * config.feature_dim
        self.widths = features, features, hidden_size
        self.qkv = nn.Linear(hidden_size, sum(self.widths), bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    @classmethod
    def build(cls, model: ModelConfig, layer: int) -> Based:
        return cls(model.hidden_size, model.num_heads, model.based)

    def reset_parameters(self) -> None:
        """Xavier-uniform with gain 2 ** -2.5."""
        for linear in (self.qkv, self.out):
            nn.init.xavier_uniform_(linear.weight, gain=2**-2.5)

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """[T, H, F] -> [T, H, K], whose products are the kernel."""
        return taylor_features(q), taylor_features(k)

    @property
    def num_features(self) -> int:
        """K."""
        width = self.config.feature_dim
        return 1 + width + width * (width + 1) // 2

    def divide(self, sums: Tensor) -> Tensor:
        """Weighted sums of values, and of ones in the last column -> means; [T, H, V + 1] -> [T, H, V]."""
        return sums[..., :-1] / sums[..., -1:]

    def forward(self, x: Tensor, shard: SequenceShard, state: BasedState | None = None) -> tuple[Tensor, BasedState]:
        q, k, v = (tensor.unflatten(-1, (self.num_heads, -1)) for tensor in self.qkv(x).split(self.widths, dim=-1))
        q, k = self.features(q, k)
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)  # the last column sums the keys
        sums, S = shard.scan(ScalarDecay(chunk=self.config.chunk), (q, k, v, None), None if state is None else state.S)
        return self.out(self.divide(sums).flatten(1)), BasedState(S)  # [T, H, V] -> [T, D]

    def cuts(self) -> dict[str, Cut]:
        features, value = (self.num_heads, self.config.feature_dim), (self.num_heads, self.head_dim)
        return {"qkv.weight": Cut(0, (features, features, value)), "out.weight": Cut(1, (value,))}

    def keep_heads(self, part: int, parts: int) -> None:
        self.num_heads, _ = share(self.num_heads, part, parts)
        features = self.num_heads * self.config.feature_dim
        self.widths = features, features, self.num_heads * self.head_dim

    def flops_per_token(self, seq_length: int) -> int:
        """Forward FLOPs of one token, the recurrence in its recurrent form (outer product, add, read-out)."""
        weights = self.qkv.weight.numel() + self.out.weight.numel()
        return 2 * weights + 4 * self.num_heads * self.num_features * (self.head_dim + 1)
