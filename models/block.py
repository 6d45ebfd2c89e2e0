"""A block of the residual stream, and what the letters of a pattern stand for."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from .config import ModelConfig
from .ffn import SwiGLU
from .mixers.registry import MIXERS
from .moe import MoE
from .norm import RMSNorm
from .sequence import SequenceShard


def _feed_forward(config: ModelConfig) -> SwiGLU | MoE:
    if config.ffn == "moe":
        return MoE(config.hidden_size, config.ffn_width, config.moe, config.initializer_range)
    return SwiGLU(config.hidden_size, config.ffn_width, config.initializer_range)


class BlockOutput(NamedTuple):
    """`x` [T', D], the mixer's `state`, the auxiliary loss `aux` of each document, and the mixer's `pool`, for later layers.

    `aux` and `pool` are None where a block has none. A pool is what tokens held here may read: it stays here and is no state.
    """

    x: Tensor
    state: Any
    aux: Tensor | None
    pool: Tensor | None


class Block(nn.Module):
    """`x + mixer(norm(x))`, then `x + ffn(norm(x))`; either may be absent. [T', D] -> [T', D].

    T' tokens are this shard's share between layers: all T where one process owns all heads.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        letter = config.layers[layer]
        mixer = {"L": config.linear_mixer, "N": "attention", "M": "mamba2", "*": "attention", "-": None}[letter]
        self.mixer = None if mixer is None else MIXERS[mixer].build(config, layer)
        self.ffn = _feed_forward(config) if letter in "LN-" else None
        self.mixer_norm = None if mixer is None else RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.ffn_norm = None if self.ffn is None else RMSNorm(config.hidden_size, eps=config.norm_eps)
        for norm in (self.mixer_norm, self.ffn_norm):
            if norm is not None:
                norm.weight.no_weight_decay = True  # type: ignore[attr-defined]

    def reset_parameters(self) -> None:
        """Initialise as published."""
        for module in (self.mixer, self.ffn):
            if module is not None:
                module.reset_parameters()  # type: ignore[operator]
        for norm in (self.mixer_norm, self.ffn_norm):
            if norm is not None:
                nn.init.ones_(norm.weight)

    def forward(
        self, x: Tensor, shard: SequenceShard, state: Any = None, memory: tuple[Tensor, ...] = ()
    ) -> BlockOutput:
        """[T', D] -> [T', D] and what goes with it; `memory` is the pools of the layers before, in order."""
        aux = pool = None
        if self.mixer is not None:
            assert self.mixer_norm is not None
            normed = shard.to_heads(self.mixer_norm(x))  # [T', D] -> [T, D]
            # Optional plug points: a mixer may read earlier layers' pools, and may have a loss of its own.
            recall: Any = getattr(self.mixer, "recall", None)
            auxiliary: Any = getattr(self.mixer, "auxiliary", None)
            if recall is not None:
                y, state, pool = recall(normed, shard, state, memory)
            else:
                y, state = self.mixer(normed, shard, state)
            if auxiliary is not None:
                aux = auxiliary(normed, shard)
            x = x + shard.from_heads(y)  # [T, D] -> [T', D]
        if self.ffn is not None:
            assert self.ffn_norm is not None
            normed = shard.to_heads(self.ffn_norm(x))
            if isinstance(self.ffn, MoE):
                y, extra = self.ffn(normed, shard)
                aux = extra if aux is None else aux if extra is None else aux + extra
            else:
                y = self.ffn(normed)
            x = x + shard.from_heads(y)
        return BlockOutput(x, state, aux, pool)

    def flops_per_token(self, seq_length: int) -> int:
        """Forward FLOPs of one token."""
        total = 0
        if self.mixer is not None:
            total += self.mixer.flops_per_token(seq_length)  # type: ignore[operator]
        if self.ffn is not None:
            total += self.ffn.flops_per_token()
        return total

