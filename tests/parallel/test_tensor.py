"""Tensor parallelism: a model whose heads and vocabulary are divided is the same model, gradients of every rank included."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from longhaul.launcher.verify.subjects import REMEMBER, VOCABULARY, config, prepared
from longhaul.models import encoder
from longhaul.models.config import LINEAR_MIXERS, ModelConfig
from longhaul.models.encoder import Encoder, EncoderConfig, MaskedTokens
from longhaul.models.errors import UserError
from longhaul.models.heads import narrow
from longhaul.models.lm import LanguageModel, LossOutput
from longhaul.models.mixers.registry import MIXERS
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import SequenceShard, WholeSequence
from longhaul.parallel.comm import Comm, Ledger
from longhaul.parallel.engine import SequenceParallel
from longhaul.parallel.mesh import Degrees, ParallelMesh
from longhaul.parallel.tensor import TensorParallel, local_ranges
from tests.harness.numerics import assert_close
from tests.harness.pool import run_ranks

BOUNDS = (0, 2, 12, 13, 29)  # odd lengths, a document of one token, one that crosses from rank to rank


def make(name: str, ffn: str = "swiglu") -> LanguageModel:
    moe = replace(ModelConfig().moe, num_experts=3, top_k=2, expert_hidden_size=6, balance_weight=0.1)
    options: dict[str, Any] = {"pattern": "L" if name != "attention" else "N", "ffn": ffn, "moe": moe}
    if name != "attention":
        options["linear_mixer"] = name
    model = prepared(LanguageModel(config(**options)), REMEMBER.get(name, {}))
    assert isinstance(model, LanguageModel)
    return model.double()


def make_encoder(name: str) -> Encoder:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_layers": 2, "max_positions": 16, "projected": 5}
    model = prepared(Encoder(EncoderConfig(mixer=name, ffn_hidden_size=8, **sizes)), {})
    assert isinstance(model, Encoder)
    return model.double()


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens, labels = torch.randint(VOCABULARY, (2, BOUNDS[-1]), generator=generator)
    weights = torch.rand(BOUNDS[-1], generator=generator, dtype=torch.float64)
    weights[4:9] = 0
    return tokens, labels, weights


def loss(
    model: Any, tokens: torch.Tensor, shard: SequenceShard, labels: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(model, Encoder):
        return model.loss(MaskedTokens(tokens, labels, weights), shard)
    output = model(tokens, shard, labels=labels, weights=weights)
    assert isinstance(output, LossOutput)
    return output.loss_sum, output.weight_sum


def loss_and_gradients(rank: int, world_size: int, name: str, ffn: str, sequence: int, recompute: str) -> dict[str, Any]:
    degrees = Degrees(sequence=sequence, tensor=world_size // sequence)
    mesh, ledger = ParallelMesh(degrees, rank), Ledger()
    model = make_encoder(name) if ffn == "encoder" else make(name, ffn)
    model.activation_checkpointing = recompute
    tensor = TensorParallel(model, Comm(mesh.tensor_group, ledger))
    engine = SequenceParallel(Comm(mesh.sequence_group, ledger), tensor=tensor.comm)
    documents = Documents(BOUNDS)
    shard = engine.shard(documents)
    index = torch.cat([torch.arange(a, b) for a, b in engine.local_tokens(documents)])
    tokens, labels, weights = (x[index] for x in batch())
    loss_sum, weight_sum = loss(model, tokens, shard, labels, weights)
    forward = {label: count.messages for (label, _), count in ledger.counts.items() if label.endswith("forward")}
    loss_sum.backward()
    after = {label: count.messages for (label, _), count in ledger.counts.items() if label.endswith("forward")}
    if recompute != "none":
        assert after == forward, "a recomputed forward sent something"
    tensor.sum_shared_gradients()
    found = {}
    square = torch.zeros((), dtype=torch.float64)
    over_ranks = Comm(mesh.sequence_group)
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        total = over_ranks.all_reduce(parameter.grad, "test").wait()
        square += tensor.square_norm(total, parameter_name)
        kept = tensor.kept.get(parameter_name)
        found[parameter_name] = [
            (None if held is None else (kept.axis, held.start, held.stop), view.clone())  # type: ignore[union-attr]
            for view, held in local_ranges(total, kept)
        ]
    square = tensor.comm.all_reduce(square, "test").wait()
    everything = Comm(mesh.gradient_group if world_size == sequence else torch.distributed.group.WORLD)
    sums = torch.stack([loss_sum.detach(), weight_sum.double()])
    return {"sums": everything.all_reduce(sums, "test").wait(), "gradients": found, "square": square}


CASES = [(name, "swiglu", 1, 2, "none") for name in ("attention", *LINEAR_MIXERS, "jrt")]
CASES += [(name, "moe", 2, 4, "none") for name in ("attention", "linear_attention", "mamba2", "gated_deltanet", "mom")]
CASES += [("attention", "swiglu", 1, 4, "full"), ("mamba2", "swiglu", 1, 4, "full"), ("memmamba", "swiglu", 2, 4, "full")]
CASES += [(name, "encoder", 1, 2, "none") for name in encoder.MIXERS] + [("attention", "encoder", 2, 4, "full")]


@pytest.mark.parametrize("name, ffn, sequence, world_size, recompute", CASES)
def test_divided_heads_are_the_same_model(name: str, ffn: str, sequence: int, world_size: int, recompute: str) -> None:
    reference = make_encoder(name) if ffn == "encoder" else make(name, ffn)
    tokens, labels, weights = batch()
    loss_sum, weight_sum = loss(reference, tokens, WholeSequence(Documents(BOUNDS)), labels, weights)
    loss_sum.backward()
    gradients = {n: p.grad for n, p in reference.named_parameters()}
    arguments = {"name": name, "ffn": ffn, "sequence": sequence, "recompute": recompute}
    for rank, found in enumerate(run_ranks(loss_and_gradients, world_size, **arguments)):
        assert_close(found["sums"][0], loss_sum, f"loss, rank {rank}")
        assert_close(found["sums"][1], weight_sum, f"weight, rank {rank}")
        assert found["gradients"].keys() == gradients.keys()
        for parameter, views in found["gradients"].items():
            whole = gradients[parameter]
            assert whole is not None
            for held, view in views:
                part = whole if held is None else whole.narrow(held[0], held[1], held[2] - held[1])
                assert_close(view, part, f"gradient of {parameter} at {held}, rank {rank}")
        square = sum(float(g.square().sum()) for g in gradients.values() if g is not None)
        assert_close(found["square"], torch.tensor(square, dtype=torch.float64), f"norm, rank {rank}")


def state_traffic(rank: int, world_size: int, names: list[str], tensor: int) -> dict[str, dict[str, int]]:
    """Bytes of states, and of keys and values, that this rank receives in a forward and a backward on two sequence ranks."""
    mesh = ParallelMesh(Degrees(sequence=world_size // tensor, tensor=tensor), rank)
    comm = Comm(mesh.tensor_group)
    found = {}
    for name in names:
        model = make(name)
        TensorParallel(model, comm)
        ledger = Ledger()
        engine = SequenceParallel(Comm(mesh.sequence_group, ledger), tensor=comm)
        shard = engine.shard(Documents(BOUNDS))
        index = torch.cat([torch.arange(a, b) for a, b in engine.local_tokens(Documents(BOUNDS))])
        tokens, labels, weights = (x[index] for x in batch())
        loss(model, tokens, shard, labels, weights)[0].backward()
        labelled = (f"{what} {way}" for what in ("state", "kv") for way in ("forward", "backward"))
        found[name] = {label: total for label in labelled if (total := ledger.total(label).bytes)}
    return found


def test_every_mixer_is_cut() -> None:
    """With two owners of heads, each exchanges half of the state that one does, to the byte."""
    names = list(MIXERS)
    whole, *_ = run_ranks(state_traffic, 2, names=names, tensor=1)
    for rank, halves in enumerate(run_ranks(state_traffic, 4, names=names, tensor=2)):
        for name in names:
            assert whole[name], f"{name} exchanges nothing: the comparison is empty"
            assert halves[name] == {label: size // 2 for label, size in whole[name].items()}, f"{name}, rank {rank}"


def test_more_owners_than_heads() -> None:
    with pytest.raises(UserError, match=r"parallel\.tensor_parallel_size 8 is more than a layer's 4 heads"):
        narrow(make("linear_attention").layers[0].mixer, 0, 8)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"parallel\.tensor_parallel_size 3 neither divides a layer's 4 heads"):
        narrow(make("linear_attention").layers[0].mixer, 0, 3)  # type: ignore[arg-type]
