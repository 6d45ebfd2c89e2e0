"""ReBased: Based with a kernel that can reach zero.

Aksenov et al., "Linear Transformers with Learnable Kernel Functions are Better In-Context Models" (arXiv 2402.10644), section 4.

    paper                                              here
    norm(x)                                            layer norm of a head's q or k over its F channels
    gamma_Q, beta_Q, gamma_K, beta_K                   weight[0], bias[0], weight[1], bias[1], [H, F] each
    q' = gamma_Q norm(q) + beta_Q, k' likewise         affine
    sim(q, k) = (q' . k')^2 (over F, as released)      square_features, F (F + 1) / 2 = 136 columns
    sums and their quotient                            as in `based.py`; state [H, 136, V + 1]

The square is that of the product, not of every channel: all pairs x_i x_j are features. A quadratic kernel with a learned
affine map has its minimum, zero, wherever training puts it; Based's lies at one half.

What the references leave open: the released code normalises over the channels of all heads together, flash-linear-attention
over a head's with gamma and beta shared by all heads, q and k. Here the norm is a head's own (heads stay independent), and every
head's q and k have their own gamma and beta. The denominator may be zero, so `eps` is added to it.

Legend: T tokens held here, D model width, H heads, V = D / H, F feature dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..heads import Cut
from .based import Based, BasedConfig, square_features

if TYPE_CHECKING:
    from ..config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ReBasedConfig(BasedConfig):
    """ReBased."""

    eps: float = 1e-6
    """Added to the denominator."""


class ReBased(Based):
    """[T, D] -> [T, D]."""

    config: ReBasedConfig

    def __init__(self, hidden_size: int, num_heads: int, config: ReBasedConfig, norm_eps: float = 1e-5) -> None:
        super().__init__(hidden_size, num_heads, config)
        self.norm_eps = norm_eps
        self.weight = nn.Parameter(torch.empty(2, num_heads, config.feature_dim))
        self.bias = nn.Parameter(torch.empty(2, num_heads, config.feature_dim))
        for parameter in (self.weight, self.bias):
            parameter.no_weight_decay = True  # type: ignore[attr-defined]

    @classmethod
    def build(cls, model: ModelConfig, layer: int) -> ReBased:
        return cls(model.hidden_size, model.num_heads, model.rebased, model.norm_eps)

    def reset_parameters(self) -> None:
        """Xavier-uniform with gain 2 ** -2.5; gamma one, beta zero."""
        super().reset_parameters()
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def affine(self, x: Tensor, which: int) -> Tensor:
        """[T, H, F] -> [T, H, F]."""
        normed = F.layer_norm(x, x.shape[-1:], eps=self.norm_eps)
        return torch.addcmul(self.bias[which].to(x.dtype), normed, self.weight[which].to(x.dtype))

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.config.feature_dim**-0.25  # on either side: the kernel is (q' . k' / sqrt(F))^2
        return square_features(self.affine(q, 0) * scale), square_features(self.affine(k, 1) * scale)

    def cuts(self) -> dict[str, Cut]:
        heads = Cut(1, ((self.num_heads, 1),))
        return {**super().cuts(), "weight": heads, "bias": heads}

    @property
    def num_features(self) -> int:
        return self.config.feature_dim * (self.config.feature_dim + 1) // 2

    def divide(self, sums: Tensor) -> Tensor:
        return sums[..., :-1] / (sums[..., -1:] + self.config.eps)
