"""Lightning attention: linear attention with a fixed decay per head.

Qin et al., "Lightning Attention-2" (arXiv 2401.04658) and TransNormerLLM. The decay's slopes have three published definitions
that do not agree; none is "the" one, so they go by name:

    name        log decay of head h = 0 .. H - 1 in layer l = 0 .. L - 1      source
    alibi       -2 ** (-8 (h + 1) / H), the same in every layer               Linear-MoE (ALiBi slopes)
    minimax     the alibi slope times (1 - l / (L - 1 + 1e-5) + 1e-5)         Hugging Face MiniMax
    linear      -(8 / H) (1 - l / L) h: head 0 never forgets                  flash-linear-attention

For H not a power of two, ALiBi takes the slopes of the power of two below and every other slope of the one above.

    paper                              here
    lambda (decay)                     exp(log_decay), [H]
    kv_t = lambda kv_t-1 + k_t^T v_t   ScalarDecay, state [H, K, V]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import UserError
from ..heads import Cut
from .linear_attention import LinearAttention, LinearAttentionConfig

if TYPE_CHECKING:
    from ..config import ModelConfig

SLOPES = ("alibi", "minimax", "linear")


@dataclass(frozen=True, kw_only=True)
class LightningConfig(LinearAttentionConfig):
    """Lightning attention."""

    slopes: str = "alibi"
    """Definition of the heads' decays: alibi, minimax or linear."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slopes not in SLOPES:
            raise UserError(f"slopes {self.slopes!r} is none of {', '.join(SLOPES)}.")


def alibi_slopes(num_heads: int) -> list[float]:
    """ALiBi slopes (Press et al., arXiv 2108.12409) of all heads."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    if power < num_heads:
        slopes += [2 ** (-8 * (h + 1) / (2 * power)) for h in range(0, 2 * power, 2)][: num_heads - power]
    return slopes


def lightning_log_decay(slopes: str, num_heads: int, layer: int, num_layers: int) -> Tensor:
    """Log decay of each head, float64 [H]; `layer` counts from 0."""
    if slopes == "linear":
        return -(8 / num_heads) * (1 - layer / num_layers) * torch.arange(num_heads, dtype=torch.float64)
    decay = -torch.tensor(alibi_slopes(num_heads), dtype=torch.float64)
    if slopes == "minimax":
        decay = decay * (1 - layer / (num_layers - 1 + 1e-5) + 1e-5)
    return decay


class Lightning(LinearAttention):
    """[T, D] -> [T, D]."""

    decay: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        config: LightningConfig,
        layer: int,
        num_layers: int,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(hidden_size, num_heads, config, norm_eps)
        self._decay = (config.slopes, num_heads, layer, num_layers)
        self.register_buffer("decay", lightning_log_decay(*self._decay).to(torch.get_default_dtype()), persistent=False)

    @classmethod
    def build(cls, model: ModelConfig, layer: int) -> Lightning:
        return cls(model.hidden_size, model.num_heads, model.lightning, layer, model.num_layers, model.norm_eps)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.decay.copy_(lightning_log_decay(*self._decay))

    def log_decay(self) -> Tensor:
        return self.decay

    def cuts(self) -> dict[str, Cut]:
        return {**super().cuts(), "decay": Cut(0, ((self.num_heads, 1),))}
