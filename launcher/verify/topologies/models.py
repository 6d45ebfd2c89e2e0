"""The tiny models of the matrix, by name: a few layers of 16 numbers a token, whose gates remember.

Four layers each, so that two processes can have two stages of a pipeline; of the cheap kind (FFN alone) where nothing is lost.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from longhaul.models.config import ModelConfig
from longhaul.models.encoder import Encoder, EncoderConfig
from longhaul.models.lm import LanguageModel, Layers, LossOutput
from longhaul.models.ops.attention import Mask
from longhaul.models.sequence import SequenceShard

from ..cells import DTYPES
from ..subjects import REMEMBER, WIDTH, config, prepared

ENCODER, MOE = "encoder", "moe"
VOCABULARY = 264  # bytes, ends of documents, masks

# Name -> fields of `ModelConfig` beside those of `tiny`.
DECODERS: dict[str, dict[str, Any]] = {
    "linear_attention": {"pattern": "L-L-", "linear_mixer": "linear_attention"},
    "mamba2": {"pattern": "M-L-", "linear_mixer": "mamba2"},
    "gated_deltanet": {"pattern": "L-L-", "linear_mixer": "gated_deltanet"},
    "mom": {"pattern": "L-L-", "linear_mixer": "mom", "tie_embeddings": False},
    "memmamba": {"pattern": "LL-L", "linear_mixer": "memmamba"},
    "hybrid": {"pattern": "LN-N", "linear_mixer": "mamba2"},
    MOE: {"pattern": "L-N-", "linear_mixer": "linear_attention", "ffn": "moe"},
}
MODELS = (*DECODERS, ENCODER)


def tiny(name: str) -> ModelConfig:
    """The configuration of a decoder; for the encoder, whose options are its own, only the vocabulary counts."""
    plain = ModelConfig()
    moe = replace(plain.moe, num_experts=4, top_k=2, expert_hidden_size=6, shared_hidden_size=4, balance_weight=0.1)
    options = {"vocab_size": VOCABULARY, "num_layers": 4, "moe": moe, "mom": replace(plain.mom, chunk=8, num_memories=3)}
    return config(**{**options, **DECODERS.get(name, {})})


def make(name: str, dtype: str) -> nn.Module | None:
    """A fresh model, the same on every process; None stands for what the trainer makes of `tiny`.

    In fp64 its gates remember, and no parameter is at a value that hides an error. In fp32 it is initialised as published: the
    gradients of gates that remember are sums that cancel, which float32 alone gets wrong by more than what is allowed.
    """
    torch.manual_seed(0)
    if name == ENCODER:
        encoder = TrainedEncoder(
            EncoderConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_layers=2, num_heads=4, ffn_hidden_size=8)
        )
        return encoder if dtype == "fp32" else prepared(encoder, {}).to(DTYPES[dtype])
    if dtype == "fp32":
        return None
    return prepared(LanguageModel(tiny(name)), REMEMBER.get(DECODERS[name]["linear_mixer"], {})).to(DTYPES[dtype])


class TrainedEncoder(Encoder):
    """An encoder called as the trainer calls a decoder: the weighted loss of the labels, whatever they ask for."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.layers = Layers(self.layers)

    def forward(  # type: ignore[override]
        self,
        tokens: Tensor,
        shard: SequenceShard,
        state: Any = None,
        labels: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, None] | LossOutput:
        """As `LanguageModel.forward`, of all layers; there is no state."""
        hidden = super().forward(tokens, shard)
        if labels is None:
            return hidden, None
        weights = torch.ones_like(labels, dtype=torch.float32) if weights is None else weights
        loss_sum, weight_sum = self.head(hidden, labels, weights)
        return LossOutput(loss_sum, weight_sum, None)

    def needs(self) -> tuple[bool, list[Mask]]:
        """As `LanguageModel.needs`."""
        return False, [Mask(causal=False)]

    def flops_per_token(self, seq_length: int) -> int:
        """For reports, which nobody reads of a run of the matrix."""
        return 1
