"""Streaming over ranks: each chunk is spread over them, and gradients are those of the whole stream in one process."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longhaul.launcher.batches import stream_indices
from longhaul.launcher.step import Stepper
from longhaul.models.config import LINEAR_MIXERS, ModelConfig
from longhaul.models.errors import UserError
from longhaul.models.lm import LanguageModel
from longhaul.models.mixers.attention import AttentionConfig
from longhaul.models.moe import MoEConfig
from longhaul.models.ops.segments import Documents
from longhaul.models.streaming import LongStream, Streaming
from longhaul.parallel.comm import Comm, Ledger
from longhaul.parallel.data import DataParallel
from longhaul.parallel.engine import SequenceParallel
from longhaul.parallel.mesh import Degrees, ParallelMesh
from longhaul.parallel.runtime import Runtime
from longhaul.parallel.tensor import TensorParallel, local_ranges
from tests.harness.numerics import assert_close, assert_trees_close
from tests.harness.pool import run_ranks
from tests.launcher import test_loss
from tests.launcher.runs import tiny, train_rank, whole_parameters, write_corpus
from tests.models.test_streaming import CHUNK, LENGTH, SCALE, model_of, reference, state_before, stream_of, streamable

HYBRIDS = {"window": 4, "full attention": None}
EXPERTS = MoEConfig(num_experts=3, expert_hidden_size=4, balance_weight=0.5, z_weight=0.2)


def make(subject: str) -> LanguageModel:
    if subject in HYBRIDS:
        return model_of(pattern="LN", linear_mixer="mamba2", attention=AttentionConfig(window=HYBRIDS[subject]))
    if subject == "experts":
        return model_of(linear_mixer="mom", mom=streamable("mom"), ffn="moe", moe=EXPERTS)
    return model_of(linear_mixer=subject, **{subject: streamable(subject)})


def compare(rank: int, world_size: int, subject: str, exchange: str, keep: str) -> None:
    """Compares on the rank; returns nothing."""
    torch.set_default_dtype(torch.float64)
    try:
        engine = SequenceParallel(Comm(dist.group.WORLD), exchange=exchange)
        model = make(subject)
        for bounds in ((0, 3, 5, 12, 13, LENGTH), (0, LENGTH)):
            stream, state = stream_of(bounds, 7), state_before(model)
            expected = reference(model, stream, state, keep_state=True)
            streaming = Streaming(model, CHUNK, lambda documents, on: engine.shard(documents, "cpu", on), keep=keep)
            out = streaming.backward(stream, state, scale=SCALE, keep_state=True)
            found = {"loss": out.loss_sum, "weight": out.weight_sum, "gradients": {}}
            for tensor in found["loss"], found["weight"]:
                dist.all_reduce(tensor)
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None, name
                dist.all_reduce(parameter.grad)
                found["gradients"][name] = parameter.grad
            found.update(state=out.state, dstate=out.state_gradient)  # replicated: as they are on this rank
            assert_trees_close(found, expected, f"{subject}, documents {bounds}")
            model.zero_grad(set_to_none=True)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("subject", (*LINEAR_MIXERS, *HYBRIDS, "experts"))
def test_two_ranks(subject: str) -> None:
    run_ranks(compare, 2, subject=subject, exchange="all_gather", keep="all", timeout=120)


@pytest.mark.parametrize("subject", ("mamba2", "window", "experts"))
def test_three_ranks_and_a_ring(subject: str) -> None:
    run_ranks(compare, 3, subject=subject, exchange="ring", keep="two_level", timeout=120)


def messages(rank: int, world_size: int, chunk: int) -> int:
    engine = SequenceParallel(Comm(dist.group.WORLD))
    model = LanguageModel(ModelConfig(vocab_size=20, hidden_size=16, num_layers=1, num_heads=2, pattern="L",
                                      linear_mixer="linear_attention"))  # fmt: skip
    values = torch.zeros(24, dtype=torch.int64)
    stream = LongStream(values, values, torch.ones(24), Documents((0, 24)))
    Streaming(model, chunk, lambda documents, on: engine.shard(documents, "cpu", on)).backward(stream)
    return engine.ledger.total().messages


def test_a_chunk_costs_two_forwards_of_messages_and_one_backward() -> None:
    whole = run_ranks(messages, 2, chunk=24)[0]
    assert whole > 0
    forward = backward = whole / 2  # one exchange each way
    assert run_ranks(messages, 2, chunk=8)[0] == 2 * forward + 3 * (forward + backward)


def train(
    rank: int, world_size: int, degrees: Degrees, style: str, chunk: int | None, recompute: str = "none"
) -> dict[str, Any]:
    """The streams of test_loss, through the trainer's step; of each parameter what this rank's heads hold, and where."""
    ledger = Ledger()
    runtime, mesh = Runtime(rank, world_size, device="cpu"), ParallelMesh(degrees, rank)
    lm = test_loss.model()
    lm.activation_checkpointing = recompute
    tensor = TensorParallel(lm, Comm(mesh.tensor_group))
    engine = SequenceParallel(Comm(mesh.sequence_group), tensor=tensor.comm)
    parallel = DataParallel(lm, mesh, style, blocks=tuple(lm.layers), ledger=ledger, tensor=tensor)
    optimizer = torch.optim.SGD(lm.parameters(), lr=1.0)
    stepper = Stepper(parallel, engine, runtime, optimizer, stream_tokens=chunk)
    samples, losses = test_loss.streams("some"), []
    for step in range(test_loss.STEPS):
        chosen = stream_indices(step * test_loss.BATCH, test_loss.BATCH, mesh.data_rank, degrees.data)
        losses.append(stepper.train([samples[index] for index in chosen], test_loss.RATE).loss)
    parameters = {}
    for name, parameter in whole_parameters(lm).items():
        kept = tensor.kept.get(name)
        parameters[name] = [
            (None if held is None or kept is None else (kept.axis, held.start, held.stop - held.start), view.clone())
            for view, held in local_ranges(parameter, kept)
        ]
    return {"losses": losses, "parameters": parameters, "reduced": ledger.total("gradients").bytes}


@pytest.mark.parametrize(
    ("degrees", "style", "recompute"),
    [
        (Degrees(), "fsdp", "none"),
        (Degrees(data=2), "fsdp", "selective"),
        (Degrees(sequence=2), "ddp", "none"),
        (Degrees(data=2, sequence=2, replicate=2), "fsdp", "none"),  # copies of two shards each
        (Degrees(data=2, tensor=2), "fsdp", "none"),
    ],
)
def test_steps_of_the_trainer(degrees: Degrees, style: str, recompute: str) -> None:
    arguments: Any = {"degrees": degrees, "style": style, "chunk": 12, "recompute": recompute}
    single = degrees.world_size == 1
    results = [train(0, 1, **arguments)] if single else run_ranks(train, degrees.world_size, timeout=120, **arguments)
    expected = test_loss.oracle("some", 0.0)
    for rank, result in enumerate(results):
        losses = torch.tensor(result["losses"], dtype=torch.float64)
        assert_close(losses, torch.tensor(expected["losses"], dtype=torch.float64), f"losses on rank {rank}")
        assert result["parameters"].keys() == expected["parameters"].keys()
        for name, parts in result["parameters"].items():
            for place, value in parts:
                whole = expected["parameters"][name]
                assert_close(value, whole if place is None else whole.narrow(*place), f"{name} at {place}, rank {rank}")


@pytest.mark.parametrize("style", ("fsdp", "ddp"))
def test_gradients_are_reduced_once_a_step(style: str) -> None:
    arguments: Any = {"degrees": Degrees(data=2), "style": style}
    chunked, whole = (run_ranks(train, 2, timeout=120, chunk=chunk, **arguments)[0]["reduced"] for chunk in (12, None))
    assert chunked == whole > 0


def test_evaluation_of_the_trainer_is_that_of_the_whole() -> None:
    lm, samples = test_loss.model(), test_loss.streams("some")[:2]
    parallel, runtime = DataParallel(lm, ParallelMesh(Degrees())), Runtime(0, 1, device="cpu")
    found = []
    for chunk in (None, 12):
        stepper = Stepper(
            parallel, SequenceParallel(Comm(None)), runtime, torch.optim.SGD(lm.parameters()), stream_tokens=chunk
        )
        found.append(torch.tensor(stepper.evaluate(samples, 0, 1)[0], dtype=torch.float64))
    assert_close(found[1], found[0], "loss")


def test_a_truncated_run_starts_alike_and_goes_its_own_way(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    found = []
    for truncated in (False, True):
        train = {"stream_tokens": 37, "stream_truncated": truncated, "steps": 1}
        config = tiny(tmp_path, data={}, checkpoint={"every": 0}, train=train, optimizer={"name": "sgd"})
        found.append(train_rank(0, 1, config)[1])
    differences = {name: (found[1][name] - value).abs().max().item() for name, value in found[0].items()}
    assert max(differences.values()) > 1e-5, "truncation changed no gradient"
    assert all(math.isfinite(value) for value in differences.values())
    with pytest.raises(UserError, match="stream_tokens"):
        tiny(tmp_path, train={"stream_truncated": True})


@pytest.mark.parametrize("carry_state", (False, True))
def test_a_run_is_the_same(carry_state: bool, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    found = []
    for chunk in (None, 37):
        sections: dict[str, Any] = {"data": {"carry_state": carry_state}, "checkpoint": {"every": 0}}
        config = tiny(tmp_path, **sections, train={"stream_tokens": chunk, "steps": 3}, optimizer={"name": "sgd"})
        outcome, parameters = train_rank(0, 1, config)
        found.append({"loss": outcome.held_out_loss, "parameters": parameters})
    assert_trees_close(found[1], found[0], "chunks of 37", tolerance=1e-5)
