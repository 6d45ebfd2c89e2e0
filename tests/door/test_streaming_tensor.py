"""Streaming where ranks divide heads, or experts: border states are a rank's heads, gradients that rank's part."""

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
from longhaul.parallel.data import DataParallel
from longhaul.parallel.engine import SequenceParallel
from longhaul.parallel.expert import ExpertParallel
from longhaul.parallel.mesh import Degrees, ParallelMesh
from longhaul.parallel.pieces import Pieces, as_pieces
from longhaul.parallel.tensor import TensorParallel
from tests.harness.numerics import assert_close
from tests.harness.pool import run_ranks

BOUNDS, CHUNK, SCALE = (0, 2, 12, 13, 29), 8, 0.37  # a document within a chunk, one over a border, one over several
EXPERTS = replace(ModelConfig().moe, num_experts=4, top_k=2, expert_hidden_size=6, balance_weight=0.5, z_weight=0.2)
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


def compare(rank: int, world_size: int, subjects: tuple[str, ...], degrees: Degrees, keep: str, recompute: str) -> None:
    """Compares on the rank; returns nothing."""
    mesh, stream = ParallelMesh(degrees, rank), stream_of()
    engine = SequenceParallel(Comm(mesh.sequence_group), tensor=Comm(mesh.tensor_group))
    for subject in subjects:
        reference, model = make(subject), make(subject)
        values = {"labels": stream.labels, "weights": stream.weights}
        expected = reference(stream.tokens, WholeSequence(stream.documents), **values)
        (expected.loss_sum * SCALE).backward()
        gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
        model.activation_checkpointing = recompute
        tensor = TensorParallel(model, Comm(mesh.tensor_group))
        experts = ExpertParallel(model, Comm(mesh.expert_group), Comm(mesh.expert_copies_group))
        parallel = DataParallel(model, mesh, "ddp", tensor=tensor, experts=experts)
        streaming = Streaming(
            parallel, CHUNK, lambda documents, on: engine.shard(documents, "cpu", on), keep=keep, accumulate=parallel.accumulate
        )
        out = streaming.backward(stream, scale=SCALE)
        sums = torch.stack([out.loss_sum, out.weight_sum.double()])
        dist.all_reduce(sums)
        aux = 0.0 if expected.aux_sum is None else expected.aux_sum
        assert_close(sums, torch.stack([expected.loss_sum.detach() - aux, expected.weight_sum.double()]), f"{subject}, loss")
        parallel.finish_gradients()
        for name, parameter in model.named_parameters():
            whole = gradients[name]
            assert parameter.grad is not None and whole is not None, name
            held = as_pieces(parameter.grad, parallel.cuts(name))
            for offsets, view in held.held if isinstance(held, Pieces) else [((0,) * whole.ndim, parameter.grad)]:
                part = whole[tuple(slice(first, first + size) for first, size in zip(offsets, view.shape))]
                assert_close(view, part, f"{subject}, {name} at {offsets}")


@pytest.mark.parametrize(
    ("degrees", "subjects", "keep", "recompute"),
    [
        (Degrees(tensor=2), tuple(SUBJECTS), "all", "none"),
        (Degrees(tensor=2, sequence=2), tuple(SUBJECTS), "cpu", "none"),
        (Degrees(tensor=4), ("mamba2", "window"), "two_level", "none"),  # more ranks than groups and key heads: some share them
        (Degrees(tensor=2, sequence=2, expert=2), ("experts", "mom"), "two_level", "selective"),
    ],
)
def test_gradients_of_every_rank(degrees: Degrees, subjects: tuple[str, ...], keep: str, recompute: str) -> None:
    arguments = {"degrees": degrees, "subjects": subjects, "keep": keep, "recompute": recompute}
    run_ranks(compare, degrees.world_size, timeout=120, **arguments)
