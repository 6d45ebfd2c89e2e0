"""Activation checkpointing over ranks: for every mode and kind of layer, the same gradients and not a message more."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from longhaul.models.config import ModelConfig
from longhaul.models.encoder import Encoder, EncoderConfig, MaskedTokens
from longhaul.models.lm import LanguageModel
from longhaul.models.mixers.mamba2 import Mamba2Config
from longhaul.models.mixers.memmamba import MemMambaConfig
from longhaul.models.mixers.mom import MoMConfig
from longhaul.models.moe import MoEConfig
from longhaul.models.ops.segments import Documents
from longhaul.parallel.comm import Comm
from longhaul.parallel.engine import SequenceParallel
from tests.harness import run_ranks
from tests.harness.numerics import assert_bitwise_equal

MAMBA2 = Mamba2Config(state_size=6, head_dim=8, chunk=8)
MODELS: dict[str, dict[str, Any]] = {
    "linear": {"pattern": "L", "linear_mixer": "gla"},
    "delta rule": {"pattern": "L", "linear_mixer": "gated_deltanet"},
    "softmax hybrid": {"pattern": "*M-", "num_layers": 3},
    "mom": {"pattern": "LN", "linear_mixer": "mom", "ffn": "moe"},
    "memmamba": {"pattern": "L", "linear_mixer": "memmamba", "num_layers": 3},
    "encoder": {},
}
MODES = [("none", True), ("selective", False), ("selective", True), ("full", False), ("full", True)]


def make_model(kind: str) -> LanguageModel | Encoder:
    torch.manual_seed(1)
    if kind == "encoder":
        return Encoder(EncoderConfig(vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, ffn_hidden_size=24))
    small: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "mamba2": MAMBA2}
    options = {"mom": MoMConfig(num_memories=3, top_k=2), "memmamba": MemMambaConfig(), "moe": MoEConfig(num_experts=3)}
    return LanguageModel(ModelConfig(**{**small, **options, **MODELS[kind]}))


def every_mode(rank: int, world_size: int, kind: str, attention: str) -> list[tuple[dict[str, int], dict[str, torch.Tensor]]]:
    """Messages of the backward by label, and all gradients, of each mode."""
    results = []
    for mode, offload in [("none", False), *MODES]:
        model, comm = make_model(kind), Comm(dist.group.WORLD)
        model.activation_checkpointing, model.activation_offload = mode, offload
        engine = SequenceParallel(comm, attention=attention)
        documents = Documents((0, 3, 50, 63))
        shard = engine.shard(documents)
        start, stop = engine.local_tokens(documents)[0]
        tokens = torch.arange(start, stop) % 40
        if isinstance(model, Encoder):
            loss = model.loss(MaskedTokens(tokens, tokens, torch.ones(len(tokens))), shard)[0]
        else:
            loss = model(tokens, shard, labels=tokens).loss_sum
        comm.ledger.reset()
        loss.backward()
        counts = {label: count.messages for (label, _), count in comm.ledger.counts.items()}
        results.append((counts, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    return results


@pytest.mark.parametrize("kind", MODELS)
def test_recomputation_sends_nothing_and_changes_no_bit(kind: str) -> None:
    attention = "rsa" if kind == "encoder" else "ring"
    for found in run_ranks(every_mode, 2, kind=kind, attention=attention):
        (expected_counts, expected), *others = found
        assert expected_counts and len(expected) > 10
        for (mode, offload), (counts, gradients) in zip(MODES, others, strict=True):
            what = f"{mode}, offload {offload}"
            assert counts == expected_counts, what
            assert not any(label.endswith("forward") for label in counts), what
            assert gradients.keys() == expected.keys()
            for name, gradient in expected.items():
                assert_bitwise_equal(gradients[name], gradient, f"{name}, {what}")
