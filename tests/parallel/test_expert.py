"""Expert parallelism: a model whose experts are divided is the same model, and what travels is counted."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longhaul.launcher.verify.subjects import VOCABULARY, config, prepared
from longhaul.models.config import ModelConfig
from longhaul.models.errors import UserError
from longhaul.models.lm import LanguageModel, LossOutput
from longhaul.models.moe import Experts
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import WholeSequence
from longhaul.parallel.comm import Comm, Ledger
from longhaul.parallel.data import DataParallel
from longhaul.parallel.engine import SequenceParallel
from longhaul.parallel.expert import ExpertParallel, Travel
from longhaul.parallel.mesh import Degrees, ParallelMesh
from longhaul.parallel.pieces import Pieces, as_pieces, local_part
from longhaul.parallel.tensor import TensorParallel
from tests.harness import RankError, run_ranks
from tests.harness.numerics import assert_close

STREAMS = ((0, 2, 12, 13, 29), (0, 1))  # a rank of the second one has no token


def make(num_experts: int = 4) -> LanguageModel:
    moe = replace(ModelConfig().moe, num_experts=num_experts, expert_hidden_size=6, shared_hidden_size=4, balance_weight=0.1)
    model = prepared(LanguageModel(config(ffn="moe", moe=moe)), {})
    assert isinstance(model, LanguageModel)
    return model.double()


def batch(stream: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(stream)
    length = STREAMS[stream][-1]
    tokens, labels = torch.randint(VOCABULARY, (2, length), generator=generator)
    return tokens, labels, torch.rand(length, generator=generator, dtype=torch.float64) + 0.1


def loss_and_gradients(rank: int, world_size: int, degrees: Degrees, sharding: str, recompute: str) -> dict[str, Any]:
    """Each group of data-parallel ranks runs its streams; what this rank holds of every gradient, by offsets."""
    mesh, ledger = ParallelMesh(degrees, rank), Ledger()
    model = make()
    model.activation_checkpointing = recompute
    tensor = TensorParallel(model, Comm(mesh.tensor_group, ledger))
    experts = ExpertParallel(model, Comm(mesh.expert_group, ledger), Comm(mesh.expert_copies_group, ledger))
    parallel = DataParallel(model, mesh, sharding, tuple(model.layers), ledger=ledger, tensor=tensor, experts=experts)
    engine = SequenceParallel(Comm(mesh.sequence_group, ledger), tensor=tensor.comm)
    streams = range(mesh.data_rank, len(STREAMS), degrees.data)
    total = torch.zeros((), dtype=torch.float64)
    for stream in streams:
        documents = Documents(STREAMS[stream])
        index = torch.cat([torch.arange(a, b) for a, b in engine.local_tokens(documents)])
        tokens, labels, weights = (x[index] for x in batch(stream))
        with parallel.accumulate(last=stream == streams[-1]):
            output = parallel(tokens, engine.shard(documents), labels=labels, weights=weights)
            before = sent(ledger)
            output.loss_sum.backward()
            assert sent(ledger) == before, "a recomputed forward sent something"
        total += output.loss_sum.detach()
    parallel.finish_gradients()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        held = as_pieces(parameter.grad, parallel.cuts(name))
        local, offsets = local_part(held)
        pieces = held.held if isinstance(held, Pieces) else [(offsets, local)]
        gradients[name] = [(offsets, view.clone()) for offsets, view in pieces]
    whole = Comm(dist.group.WORLD).all_reduce(total, "test").wait()
    calls = {label: count.calls for (label, _), count in ledger.counts.items() if label.startswith("expert")}
    return {"loss": whole, "gradients": gradients, "norm": parallel.gradient_norm(), "calls": calls}


def sent(ledger: Ledger) -> dict[str, int]:
    # Parameters are gathered again; activations are not.
    return {label: count.messages for (label, _), count in ledger.counts.items() if label.endswith(("forward", "counts"))}


CASES = [
    (Degrees(sequence=2, expert=2), "fsdp", "none"),
    (Degrees(data=2, expert=2), "ddp", "full"),
    (Degrees(data=2, sequence=2, expert=2), "fsdp", "full"),
    (Degrees(data=2, sequence=2, expert=2), "ddp", "none"),
    (Degrees(data=2, sequence=2, expert=4), "fsdp", "none"),
    (Degrees(data=2, sequence=2, replicate=2, expert=2), "fsdp", "none"),
    (Degrees(sequence=2, tensor=2, expert=2), "fsdp", "none"),
]


@pytest.mark.parametrize("degrees, sharding, recompute", CASES)
def test_divided_experts_are_the_same_model(degrees: Degrees, sharding: str, recompute: str) -> None:
    reference, loss = make(), torch.zeros((), dtype=torch.float64)
    for stream, bounds in enumerate(STREAMS):
        tokens, labels, weights = batch(stream)
        output = reference(tokens, WholeSequence(Documents(bounds)), labels=labels, weights=weights)
        assert isinstance(output, LossOutput)
        output.loss_sum.backward()
        loss += output.loss_sum.detach()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    norm = torch.stack([g.square().sum() for g in gradients.values() if g is not None]).sum().sqrt()
    ranks = run_ranks(loss_and_gradients, degrees.world_size, degrees=degrees, sharding=sharding, recompute=recompute)
    for rank, found in enumerate(ranks):
        assert_close(found["loss"], loss, f"loss, rank {rank}")
        assert_close(found["norm"], norm, f"norm, rank {rank}")
        assert found["calls"] == ranks[0]["calls"], "every rank takes part in every exchange"
        assert found["gradients"].keys() == gradients.keys()
        for name, pieces in found["gradients"].items():
            whole = gradients[name]
            assert whole is not None
            for offsets, view in pieces:
                part = whole[tuple(slice(start, start + size) for start, size in zip(offsets, view.shape))]
                assert_close(view, part, f"gradient of {name} at {offsets}, rank {rank}")
    held = sum(view.numel() for found in ranks for _, view in found["gradients"]["layers.0.ffn.experts.down"])
    assert held == reference.layers[0].ffn.experts.down.numel() * (  # type: ignore[union-attr]
        1 if sharding == "fsdp" else degrees.data * degrees.sequence // degrees.expert
    ), "experts are held more often than needed"


SIZES = ((3, 0, 1, 2), (0, 0, 0, 0))  # rows of each rank for each of four experts


def travelled(rank: int, world_size: int) -> dict[str, Any]:
    torch.manual_seed(0)
    experts = Experts(4, 5, 3).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    held = 4 // world_size
    own = Experts(held, 5, 3).double()
    for parameter, whole in zip(own.parameters(), experts.parameters()):
        parameter.data.copy_(whole[rank * held : (rank + 1) * held])
    sizes = SIZES[rank]
    rows = torch.randn(sum(sizes), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(rank), requires_grad=True)
    ledger = Ledger()
    output = Travel(Comm(dist.group.WORLD, ledger))(rows, sizes, own)
    expected = experts(rows, sizes)
    assert_close(output, expected, f"output, rank {rank}")
    given, wanted = (torch.autograd.grad((y * y.detach()).sum(), rows)[0] for y in (output, expected))
    assert_close(given, wanted, f"gradient of rows, rank {rank}")
    return {label: (count.calls, count.bytes) for (label, _), count in ledger.counts.items()}


def test_what_travels_is_counted() -> None:
    """A rank receives the rows of its experts from others, and its own outputs back; 40 bytes a row, 8 a count."""
    for rank, counts in enumerate(run_ranks(travelled, 2)):
        here = slice(2 * rank, 2 * rank + 2)
        arriving = sum(sum(SIZES[peer][here]) for peer in range(2) if peer != rank)
        leaving = sum(SIZES[rank]) - sum(SIZES[rank][here])
        assert counts == {
            "expert counts": (1, 16),
            "experts forward": (1, 40 * arriving),
            "experts back forward": (1, 40 * leaving),
            "experts back backward": (1, 40 * arriving),
            "experts backward": (1, 40 * leaving),
        }


def refused(rank: int, world_size: int) -> None:
    ExpertParallel(make(num_experts=3), Comm(dist.group.WORLD), Comm(None))


def test_experts_that_do_not_divide() -> None:
    with pytest.raises(RankError, match=r"parallel\.expert_parallel_size 2 does not divide moe\.num_experts 3"):
        run_ranks(refused, 2)
    with pytest.raises(UserError, match=r"parallel\.expert_parallel_size is 4, but experts are shared among data 2 x sequence 1"):
        Degrees.resolve(2, expert=4)


def test_placement_names_expert_groups() -> None:
    mesh = ParallelMesh.__new__(ParallelMesh)
    mesh.degrees = Degrees(data=2, sequence=2, tensor=2, expert=2)
    mesh.grid = torch.arange(8).reshape(mesh.degrees.shape)
    assert "expert groups: [0 2] [4 6] [1 3] [5 7]" in mesh.describe()
    assert "tensor groups: [0 1] [2 3] [4 5] [6 7]" in mesh.describe()


