"""A small bidirectional encoder with the masked-language-model objective (Devlin et al., arXiv 1810.04805).

It runs on the same shards as the decoder: Ring Self-Attention's own experiments are BERT's. Rotary positions inside each
document take the place of a position table, pre-norm and SwiGLU that of BERT's post-norm and GELU; there is no
next-sentence loss.

Legend: T tokens held here, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .bidirectional import (
    BidirectionalAttention,
    BidirectionalLinearAttention,
    BidirectionalMixer,
    LinformerAttention,
)
from .errors import UserError
from .ffn import SwiGLU
from .lm import LanguageHead
from .norm import RMSNorm
from .ops import recompute
from .sequence import SequenceShard


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """An encoder of pre-norm blocks."""

    vocab_size: int = 264
    """Rows of the embedding, the mask token's included."""

    hidden_size: int = 128
    """Width D of the residual stream."""

    num_layers: int = 4
    """Blocks."""

    num_heads: int = 4
    """Heads of every mixer."""

    mixer: str = "attention"
    """attention (softmax), linear (one total a document) or linformer (projected keys and values)."""

    max_positions: int = 512
    """Tokens of the longest document; only linformer has a limit."""

    projected: int = 64
    """Tokens to which linformer projects a document."""

    ffn_hidden_size: int = 256
    """Inner width of the SwiGLU."""

    norm_eps: float = 1e-5
    """Added to the mean square in every RMSNorm."""

    initializer_range: float = 0.02
    """Standard deviation of initial weights."""

    def __post_init__(self) -> None:
        if self.mixer not in MIXERS:
            raise UserError(f"encoder.mixer {self.mixer!r} is none of {', '.join(MIXERS)}.")
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"encoder.hidden_size {self.hidden_size} must be a multiple of encoder.num_heads {self.num_heads}."
            )


MIXERS: dict[str, Callable[[EncoderConfig], BidirectionalMixer]] = {
    "attention": lambda c: BidirectionalAttention(c.hidden_size, c.num_heads, c.initializer_range),
    "linear": lambda c: BidirectionalLinearAttention(c.hidden_size, c.num_heads, c.initializer_range),
    "linformer": lambda c: LinformerAttention(
        c.hidden_size, c.num_heads, c.max_positions, c.projected, c.initializer_range
    ),
}


class EncoderBlock(nn.Module):
    """`x + mixer(norm(x))`, then `x + ffn(norm(x))`. [T', D] -> [T', D], T' as in `Block`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.mixer, self.ffn = (
            MIXERS[config.mixer](config),
            SwiGLU(config.hidden_size, config.ffn_hidden_size, config.initializer_range),
        )
        self.mixer_norm, self.ffn_norm = (RMSNorm(config.hidden_size, eps=config.norm_eps) for _ in range(2))

    def reset_parameters(self) -> None:
        """Initialise as published."""
        self.mixer.reset_parameters()
        self.ffn.reset_parameters()
        for norm in (self.mixer_norm, self.ffn_norm):
            nn.init.ones_(norm.weight)

    def forward(self, x: Tensor, shard: SequenceShard) -> Tensor:
        x = x + shard.from_heads(self.mixer(shard.to_heads(self.mixer_norm(x)), shard))
        return x + shard.from_heads(self.ffn(shard.to_heads(self.ffn_norm(x))))


class Encoder(nn.Module):
    """Tokens, some of them masked, to hidden states or to the loss of guessing them.

    Attributes:
        activation_checkpointing, activation_offload: as in `LanguageModel`.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(EncoderBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.head = LanguageHead(config.hidden_size, config.vocab_size)
        self.head.register_parameter("weight", self.embedding.get_parameter("weight"))
        self.activation_checkpointing = "none"
        self.activation_offload = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters from the global generator."""
        nn.init.normal_(self.embedding.weight, std=self.config.initializer_range)
        for layer in self.layers:
            layer.reset_parameters()  # type: ignore[operator]
        nn.init.ones_(self.norm.weight)

    def forward(self, tokens: Tensor, shard: SequenceShard) -> Tensor:
        """int64 [T] -> hidden [T', D]."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = recompute.checkpoint(layer, x, shard, mode=self.activation_checkpointing, offload=self.activation_offload)
        return self.norm(x)

    def loss(self, batch: MaskedTokens, shard: SequenceShard) -> tuple[Tensor, Tensor]:
        """Sums over the tokens held here: the masked tokens' negative log likelihood (nats), and their weights."""
        return self.head(self(batch.tokens, shard), batch.labels, batch.weights)

    def sublayers(self) -> Iterator[tuple[str, nn.Module]]:
        """As in `LanguageModel`."""
        for index, layer in enumerate(self.layers):
            for name in ("mixer", "ffn"):
                yield f"layers.{index}.{name}", getattr(layer, name)


class MaskedTokens(NamedTuple):
    """What the encoder reads, int64 [T]; what was there, int64 [T]; and 1.0 where it has to be guessed, [T]."""

    tokens: Tensor
    labels: Tensor
    weights: Tensor

    def rows(self, ranges: tuple[tuple[int, int], ...]) -> MaskedTokens:
        """Those of some ranges of the stream, as a rank of a layout holds them."""
        return MaskedTokens(*(torch.cat([x[:0], *(x[a:b] for a, b in ranges)]) for x in self))


def mask_tokens(
    tokens: Tensor, mask_id: int, vocab_size: int, rate: float = 0.15, generator: torch.Generator | None = None
) -> MaskedTokens:
    """BERT's corruption of a whole stream, before it is spread over ranks.

    A token is chosen with probability `rate`; of the chosen, 80 % become `mask_id`, 10 % a random token, 10 % stay.
    """
    if not 0.0 < rate <= 1.0:
        raise UserError(f"The share of masked tokens must lie in (0, 1], but is {rate}.")
    chosen = torch.rand(tokens.shape, generator=generator) < rate
    kind = torch.rand(tokens.shape, generator=generator)
    random = torch.randint(0, vocab_size, tokens.shape, generator=generator)
    corrupted = torch.where(kind < 0.8, torch.full_like(tokens, mask_id), torch.where(kind < 0.9, random, tokens))
    return MaskedTokens(torch.where(chosen, corrupted, tokens), tokens, chosen.to(torch.float32))
