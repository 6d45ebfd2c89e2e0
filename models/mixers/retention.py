"""Retention: linear attention with a fixed decay per head, the same in every layer.

Sun et al., "Retentive Network" (arXiv 2307.08621), equations 5 to 8.

    paper                              here
    gamma_h = 1 - 2 ** (-5 - h)        exp(log_decay), [H], h = 0 .. H - 1
    S_n = gamma S_n-1 + K_n^T V_n      ScalarDecay, state [H, K, V]
    Theta (rotation of q and k)        rotary=True; the Linear-Llama3 family leaves it out, so it is off by default

The paper's xPos scaling is the decay itself; only its rotation remains to be applied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..heads import Cut
from ..ops.rope import rope_in_documents
from ..sequence import SequenceShard
from .linear_attention import LinearAttention, LinearAttentionConfig

if TYPE_CHECKING:
    from ..config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class RetentionConfig(LinearAttentionConfig):
    """Retention."""

    rotary: bool = False
    """Rotate q and k by their position inside the document, as RetNet does."""

    rope_base: float = 10000.0
    """Base of the rotation's wavelengths."""


def retention_log_decay(num_heads: int) -> Tensor:
    """Log decay of each head, float64 [H]."""
    return torch.log1p(-(2.0 ** (-5 - torch.arange(num_heads, dtype=torch.float64))))


class Retention(LinearAttention):
    """[T, D] -> [T, D]."""

    decay: Tensor
    config: RetentionConfig

    def __init__(self, hidden_size: int, num_heads: int, config: RetentionConfig, norm_eps: float = 1e-5) -> None:
        super().__init__(hidden_size, num_heads, config, norm_eps)
        self.register_buffer("decay", retention_log_decay(num_heads).to(torch.get_default_dtype()), persistent=False)

    @classmethod
    def build(cls, model: ModelConfig, layer: int) -> Retention:
        return cls(model.hidden_size, model.num_heads, model.retention, model.norm_eps)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.decay.copy_(retention_log_decay(self.num_heads))

    def log_decay(self) -> Tensor:
        return self.decay

    def cuts(self) -> dict[str, Cut]:
        return {**super().cuts(), "decay": Cut(0, ((self.num_heads, 1),))}

    def rotate(self, x: Tensor, shard: SequenceShard) -> Tensor:
        return rope_in_documents(x, shard.segments, self.config.rope_base) if self.config.rotary else x
