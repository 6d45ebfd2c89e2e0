"""Law 5: one loss, one gradient and one norm, whatever the topology, accumulation and mask."""

from typing import Any

import pytest
import torch

from longhaul.launcher.batches import stream_indices
from longhaul.launcher.data import Stream
from longhaul.launcher.step import Stepper
from longhaul.models.lm import LanguageModel
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import WholeSequence
from longhaul.parallel.comm import Comm
from longhaul.parallel.data import DataParallel
from longhaul.parallel.engine import SequenceParallel
from longhaul.parallel.mesh import Degrees, ParallelMesh
from longhaul.parallel.runtime import Runtime
from tests.harness import run_ranks
from tests.harness.numerics import assert_close, assert_trees_close

from .runs import MODEL, whole, whole_parameters

LENGTH, BATCH, STEPS, RATE = 41, 4, 3, 0.5


def streams(mask: str) -> list[Stream]:
    """Streams of every step; some tokens, all tokens of some ranks or all of a stream without weight."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for index in range(BATCH * STEPS):
        weights = (torch.rand(LENGTH, generator=generator) < 0.7).float()
        if mask == "tail":
            weights[10:] = 0  # later sequence ranks have nothing valid
        if mask == "stream" and index % BATCH in (1, 2):
            weights[:] = 0
        if mask == "all":
            weights[:] = 0
        tokens = torch.randint(0, 257, (2, LENGTH), generator=generator)
        bounds = (0, 2, 3, 29, LENGTH) if index % 2 else (0, LENGTH)
        made.append(Stream(tokens[0], tokens[1], weights, bounds, index % 3))
    return made


def model() -> LanguageModel:
    torch.manual_seed(5)
    return LanguageModel(MODEL).double()


def oracle(mask: str, clip: float) -> dict[str, Any]:
    """Plain torch: all streams in one process, sum over sum, SGD by hand."""
    lm, samples = model(), streams(mask)
    losses, norms = [], []
    for step in range(STEPS):
        total, weight = torch.zeros((), dtype=torch.float64), 0.0
        for stream in samples[step * BATCH : (step + 1) * BATCH]:
            shard = WholeSequence(Documents(stream.bounds, stream.first_position))
            output = lm(stream.tokens, shard, None, labels=stream.labels, weights=stream.weights)
            total, weight = total + output.loss_sum, weight + float(stream.weights.sum())
        loss = total / max(weight, 1.0)
        gradients = torch.autograd.grad(loss, list(lm.parameters()))
        norm = torch.sqrt(sum((gradient**2).sum() for gradient in gradients))
        scale = min(1.0, clip / (norm.item() + 1e-6)) if clip else 1.0
        with torch.no_grad():
            for parameter, gradient in zip(lm.parameters(), gradients, strict=True):
                parameter -= RATE * scale * gradient
        losses.append(loss.item())
        norms.append(norm.item())
    return {"losses": losses, "norms": norms, "parameters": whole_parameters(lm)}


def run(
    rank: int, world_size: int, degrees: Degrees, style: str, mask: str, clip: float, recompute: str
) -> dict[str, Any]:
    runtime = Runtime(rank, world_size, device="cpu")
    mesh = ParallelMesh(degrees, rank)
    engine = SequenceParallel(Comm(mesh.sequence_group))
    lm = model()
    lm.activation_checkpointing = recompute
    parallel = DataParallel(lm, mesh, style, blocks=tuple(lm.layers))
    stepper = Stepper(parallel, engine, runtime, torch.optim.SGD(lm.parameters(), lr=1.0), clip=clip)
    samples = streams(mask)
    losses, norms = [], []
    for step in range(STEPS):
        chosen = stream_indices(step * BATCH, BATCH, mesh.data_rank, degrees.data)
        result = stepper.train([samples[index] for index in chosen], RATE)
        losses.append(result.loss)
        norms.append(result.gradient_norm)
        assert result.weight == sum(float(s.weights.sum()) for s in samples[step * BATCH : (step + 1) * BATCH])
    return {"losses": losses, "norms": norms, "parameters": whole_parameters(lm)}


CASES = [
    (1, 1, "fsdp", "some", 0.0, "none"),
    (2, 1, "fsdp", "stream", 0.0, "none"),
    (2, 1, "ddp", "stream", 0.0, "none"),
    (4, 1, "fsdp", "stream", 0.1, "none"),
    (1, 2, "fsdp", "tail", 0.1, "full"),
    (1, 2, "ddp", "tail", 0.1, "full"),
    (1, 3, "fsdp", "tail", 0.0, "none"),
    (2, 2, "fsdp", "some", 0.0, "full"),
    (2, 2, "ddp", "some", 0.1, "none"),
    (2, 2, "fsdp", "all", 0.0, "none"),
]


@pytest.mark.parametrize(("data", "sequence", "style", "mask", "clip", "recompute"), CASES)
def test_loss_norm_and_parameters(
    data: int, sequence: int, style: str, mask: str, clip: float, recompute: str
) -> None:
    degrees = Degrees(data=data, sequence=sequence)
    arguments: Any = {"degrees": degrees, "style": style, "mask": mask, "clip": clip, "recompute": recompute}
    if degrees.world_size == 1:
        results = [run(0, 1, **arguments)]
    else:
        results = run_ranks(run, degrees.world_size, **arguments)
    expected = oracle(mask, clip)
    assert mask == "all" or min(expected["norms"]) > 0.2, "the clipping would test nothing"
    for rank, result in enumerate(results):
        for name in ("losses", "norms"):
            actual = torch.tensor(result[name], dtype=torch.float64)
            assert_close(actual, torch.tensor(expected[name], dtype=torch.float64), f"{name} on rank {rank}")
        assert_trees_close(result["parameters"], expected["parameters"], f"parameters on rank {rank}")


def gradients(rank: int, world_size: int, degrees: Degrees, style: str) -> dict[str, torch.Tensor]:
    mesh = ParallelMesh(degrees, rank)
    engine = SequenceParallel(Comm(mesh.sequence_group))
    lm = model()
    parallel = DataParallel(lm, mesh, style, blocks=tuple(lm.layers))
    seen: dict[str, torch.Tensor] = {}

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            seen.update((name, whole(parameter.grad)) for name, parameter in lm.named_parameters())

    stepper = Stepper(parallel, engine, Runtime(rank, world_size, device="cpu"), Spy(lm.parameters(), lr=1.0))
    samples = streams("some")
    stepper.train([samples[index] for index in stream_indices(0, BATCH, mesh.data_rank, degrees.data)], RATE)
    return seen


@pytest.mark.parametrize("style", ["fsdp", "ddp"])
def test_every_gradient_on_every_rank(style: str) -> None:
    expected = gradients(0, 1, Degrees(), style)
    degrees = Degrees(data=2, sequence=2)
    for rank, actual in enumerate(run_ranks(gradients, 4, degrees=degrees, style=style)):
        assert_trees_close(actual, expected, f"gradients on rank {rank}")


def test_same_samples_in_a_step_on_any_topology() -> None:
    for size in (1, 2, 4):
        read = [stream_indices(16, 8, rank, size) for rank in range(size)]
        assert sorted(index for indices in read for index in indices) == list(range(16, 24))
        assert len({len(indices) for indices in read}) == 1


def ledger(rank: int, world_size: int, style: str) -> dict[str, int]:
    degrees = Degrees(data=world_size)
    mesh = ParallelMesh(degrees, rank)
    comm = Comm(None)
    lm = model()
    parallel = DataParallel(lm, mesh, style, blocks=tuple(lm.layers), ledger=comm.ledger)
    stepper = Stepper(parallel, SequenceParallel(comm), Runtime(rank, world_size, device="cpu"), torch.optim.SGD(lm.parameters()))
    samples = streams("some")
    stepper.train([samples[index] for index in stream_indices(0, BATCH, rank, world_size)], RATE)
    return {"gradients": comm.ledger.total("gradients").bytes, "parameters": comm.ledger.total("parameters").bytes}


def test_gradients_are_sent_once_a_step_and_counted() -> None:
    size = sum(parameter.numel() * 8 for parameter in model().parameters())
    for counted in run_ranks(ledger, 2, style="ddp"):  # two micro-batches each, one reduction
        assert counted == {"gradients": size, "parameters": 0}
    for counted in run_ranks(ledger, 2, style="fsdp"):
        assert size / 2 <= counted["gradients"] <= size / 2 * 1.05  # rows are padded to the ranks
        assert counted["parameters"] >= size / 2
