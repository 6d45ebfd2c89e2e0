"""Streaming where ranks divide heads: a chunk's border states are a rank's heads, its gradients that rank's part."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longhaul.launcher.verify.subjects import REMEMBER, VOCABULARY, config, prepared
from longhaul.models.config import ModelConfig
from longhaul.models.lm import LanguageModel
from longhaul.models.mixers.attention import AttentionConfig
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import WholeSequence
from longhaul.models.streaming import LongStream, Streaming
from longhaul.parallel.comm import Comm
from longhaul.parallel.engine import SequenceParallel
from longhaul.parallel.mesh import Degrees, ParallelMesh
from longhaul.parallel.tensor import TensorParallel, local_ranges
from tests.harness.numerics import assert_close
from tests.harness.pool import run_ranks

BOUNDS, CHUNK, SCALE = (0, 2, 12, 13, 29), 8, 0.37  # a document within a chunk, one over a border, one over several
EXPERTS = replace(ModelConfig().moe, num_experts=3, top_k=2, expert_hidden_size=6, balance_weight=0.5, z_weight=0.2)
SUBJECTS: dict[str, dict[str, Any]] = {
    "retention": {},
    "gated_deltanet": {},
    "mamba2": {},
    "memmamba": {},
    "mom": {"mom": replace(ModelConfig().mom, balance_weight=0.3, chunk=8)},
    "window": {"pattern": "LN", "linear_mixer": "mamba2", "attention": AttentionConfig(window=5)},
    "experts": {"linear_mixer": "linear_attention", "ffn": "moe", "moe": EXPERTS},
}


def make(subject: str) -> LanguageModel:
    options = {"pattern": "L", "linear_mixer": subject, **SUBJECTS[subject]}
    model = prepared(LanguageModel(config(**options)), REMEMBER.get(options["linear_mixer"], {}))
    assert isinstance(model, LanguageModel)
    return model.double()


def stream_of() -> LongStream:
    generator = torch.Generator().manual_seed(3)
    tokens, labels = torch.randint(VOCABULARY, (2, BOUNDS[-1]), generator=generator)
    weights = torch.rand(BOUNDS[-1], generator=generator, dtype=torch.float64)
    weights[4:9] = 0
    return LongStream(tokens, labels, weights, Documents(BOUNDS))


def compare(rank: int, world_size: int, subjects: tuple[str, ...], sequence: int, keep: str, recompute: str) -> None:
    """Compares on the rank; returns nothing."""
    mesh, stream = ParallelMesh(Degrees(sequence=sequence, tensor=world_size // sequence), rank), stream_of()
    for subject in subjects:
        reference, model = make(subject), make(subject)
        values = {"labels": stream.labels, "weights": stream.weights}
        expected = reference(stream.tokens, WholeSequence(stream.documents), **values)
        (expected.loss_sum * SCALE).backward()
        gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
        model.activation_checkpointing = recompute
        tensor = TensorParallel(model, Comm(mesh.tensor_group))
        engine = SequenceParallel(Comm(mesh.sequence_group), tensor=tensor.comm)
        out = Streaming(model, CHUNK, lambda documents, on: engine.shard(documents, "cpu", on), keep=keep).backward(
            stream, scale=SCALE
        )
        sums = torch.stack([out.loss_sum, out.weight_sum.double()])
        dist.all_reduce(sums)
        aux = 0.0 if expected.aux_sum is None else expected.aux_sum
        assert_close(sums, torch.stack([expected.loss_sum.detach() - aux, expected.weight_sum.double()]), f"{subject}, loss")
        tensor.sum_shared_gradients()
        over_ranks = Comm(mesh.sequence_group)
        for name, parameter in model.named_parameters():
            whole = gradients[name]
            assert parameter.grad is not None and whole is not None, name
            total = over_ranks.all_reduce(parameter.grad, "test").wait()
            kept = tensor.kept.get(name)
            for view, held in local_ranges(total, kept):
                part = whole if held is None or kept is None else whole.narrow(kept.axis, held.start, held.stop - held.start)
                assert_close(view, part, f"{subject}, {name} at {held}")


@pytest.mark.parametrize(
    ("world_size", "sequence", "subjects", "keep", "recompute"),
    [
        (2, 1, tuple(SUBJECTS), "all", "none"),
        (4, 2, tuple(SUBJECTS), "cpu", "none"),
        (4, 1, ("mamba2", "window"), "two_level", "none"),  # more ranks than groups and key heads: neighbours share them
        (4, 2, ("mom", "window"), "two_level", "selective"),
    ],
)
def test_gradients_of_every_rank(world_size: int, sequence: int, subjects: tuple[str, ...], keep: str, recompute: str) -> None:
    run_ranks(compare, world_size, subjects=subjects, sequence=sequence, keep=keep, recompute=recompute, timeout=120)
