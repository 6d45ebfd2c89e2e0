"""Softmax attention with grouped queries and rotary positions.

Vaswani et al. (arXiv 1706.03762), grouped queries of Ainslie et al. (arXiv 2305.13245), RoPE of Su et al.
(arXiv 2104.09864) on positions inside each document.

    paper            here
    W_Q, W_K, W_V    qkv, one fused projection (q | k | v)
    h, g             num_heads H, num_kv_heads Hkv
    theta            rope_base

Legend: T tokens held here, D model width, H heads, Hkv key/value heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..errors import UserError
from ..heads import Cut, share
from ..ops.attention import Mask
from ..ops.rope import rope_in_documents
from ..sequence import KVState, SequenceShard

if TYPE_CHECKING:
    from ..config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Softmax attention."""

    rope_base: float = 10000.0
    """Base of the rotary wavelengths."""

    window: int | None = None
    """Tokens a query sees, itself included; all earlier ones if left out."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise UserError(f"attention.window must be at least 1 token, but is {self.window}.")


class SoftmaxAttention(nn.Module):
    """[T, D] -> [T, D]."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None,
        config: AttentionConfig,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        self.initializer_range = initializer_range
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_dim, self.config = hidden_size // num_heads, config
        self.qkv = nn.Linear(hidden_size, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    @classmethod
    def build(cls, model: ModelConfig, layer: int) -> SoftmaxAttention:
        return cls(model.hidden_size, model.num_heads, model.num_kv_heads, model.attention, model.initializer_range)

    def reset_parameters(self) -> None:
        """N(0, initializer_range), as Llama."""
        for linear in (self.qkv, self.out):
            nn.init.normal_(linear.weight, std=self.initializer_range)

    @property
    def mask(self) -> Mask:
        """What a token may see; a mixer that has none carries a state along the sequence instead."""
        return Mask(causal=True, window=self.config.window)

    def forward(self, x: Tensor, shard: SequenceShard, state: KVState | None = None) -> tuple[Tensor, KVState | None]:
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        qkv = self.qkv(x).unflatten(-1, (sum(heads), self.head_dim))  # [T, H + 2 Hkv, K]
        q, k, v = qkv.split(heads, dim=1)
        q, k = (rope_in_documents(tensor, shard.segments, self.config.rope_base) for tensor in (q, k))
        o, state = shard.attend(q, k, v, self.mask, state)
        return self.out(o.flatten(1)), state  # [T, H, K] -> [T, D]

    def cuts(self) -> dict[str, Cut]:
        query, key = (self.num_heads, self.head_dim), (self.num_kv_heads, self.head_dim)
        return {"qkv.weight": Cut(0, (query, key, key)), "out.weight": Cut(1, (query,))}

    def keep_heads(self, part: int, parts: int) -> None:
        self.num_heads, _ = share(self.num_heads, part, parts)
        self.num_kv_heads, _ = share(self.num_kv_heads, part, parts)

    def flops_per_token(self, seq_length: int) -> int:
        """Forward FLOPs of one token; a causal query sees half the sequence on average."""
        keys = seq_length / 2 if self.config.window is None else min(self.config.window, seq_length / 2)
        weights = self.qkv.weight.numel() + self.out.weight.numel()
        return int(2 * weights + 4 * self.num_heads * self.head_dim * keys)
