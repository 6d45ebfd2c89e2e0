"""Pipeline parallelism: a model cut between layers is the same model, under every schedule, beside every other axis."""

import contextlib
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch

from longhaul.launcher.batches import Batch, stream_indices
from longhaul.launcher.verify.subjects import REMEMBER, VOCABULARY, config, prepared
from longhaul.models.config import ModelConfig
from longhaul.models.lm import LanguageModel
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import WholeSequence
from longhaul.parallel.comm import Comm, Ledger
from longhaul.parallel.data import DataParallel
from longhaul.parallel.engine import SequenceParallel
from longhaul.parallel.mesh import Degrees, ParallelMesh
from longhaul.parallel.pipeline.layers import PipelineParallel
from longhaul.parallel.pipeline.schedule import Schedule
from longhaul.parallel.pipeline.stages import SCHEDULES, check_schedule, split_by_cost
from longhaul.parallel.tensor import TensorParallel, local_ranges
from tests.harness.numerics import assert_close
from tests.harness.pool import run_ranks
from tests.launcher.runs import whole

STREAMS = 4
BOUNDS = [(0, 2, 13, 14, 29), (0, 29), (0, 1, 17, 29), (0, 1)]  # odd lengths; of the last stream most ranks have nothing
SCALE = 0.3


class Case(NamedTuple):
    """What runs, and where."""

    mixer: str = "linear_attention"
    degrees: Degrees = Degrees(pipeline=2)
    schedule: str = "1f1b"
    backend: str = "fsdp"
    layout: str = "contiguous"
    recompute: str = "none"
    ffn: str = "swiglu"
    tied: bool = True
    layers: int = 4

    @property
    def name(self) -> str:
        sizes = [f"{axis[0]}{size}" for axis, size in vars(self.degrees).items() if size > 1]
        parts = [self.mixer, *sizes, self.schedule]
        parts += [value for value in self[3:-2] if value not in ("fsdp", "contiguous", "none", "swiglu")]
        return "-".join(parts if self.tied else [*parts, "untied"])


def make(case: Case) -> LanguageModel:
    moe = replace(ModelConfig().moe, num_experts=3, top_k=2, expert_hidden_size=6, balance_weight=0.1)
    pattern = "LLLN" if case.mixer != "attention" else "N"
    options: dict[str, Any] = {"pattern": pattern, "num_layers": case.layers, "ffn": case.ffn, "moe": moe}
    if case.mixer != "attention":
        options["linear_mixer"] = case.mixer
    options["tie_embeddings"] = case.tied
    model = prepared(LanguageModel(config(**options)), REMEMBER.get(case.mixer, {}))
    assert isinstance(model, LanguageModel)
    model.activation_checkpointing = case.recompute
    return model.double()


def stream(index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Documents]:
    """Tokens, labels, weights; some tokens are masked, and the tail of a stream."""
    generator = torch.Generator().manual_seed(index)
    documents = Documents(BOUNDS[index])
    tokens, labels = torch.randint(VOCABULARY, (2, documents.num_tokens), generator=generator)
    weights = torch.rand(documents.num_tokens, generator=generator, dtype=torch.float64)
    weights[4:9] = 0
    if index == 2:
        weights[10:] = 0
    return tokens, labels, weights, documents


@cache
def expected(case: Case) -> dict[str, Any]:
    """All streams, one after another, in one process."""
    model = make(case)
    loss = torch.zeros((), dtype=torch.float64)
    for index in range(STREAMS):
        tokens, labels, weights, documents = stream(index)
        output = model(tokens, WholeSequence(documents), labels=labels, weights=weights)
        (output.loss_sum * SCALE).backward()
        loss += output.loss_sum.detach() - (0 if output.aux_sum is None else output.aux_sum)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norm = torch.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))  # type: ignore[misc,arg-type]
    return {"gradients": gradients, "loss": loss, "norm": norm}


def step(rank: int, world_size: int, case: Case) -> dict[str, Any]:
    """One step on this rank: gradients with their names, the loss, the norm, what was sent."""
    mesh, ledger = ParallelMesh(case.degrees, rank), Ledger()
    model = make(case)
    each = check_schedule(case.schedule, case.degrees.pipeline, None, STREAMS // case.degrees.data)
    pipeline = PipelineParallel(model, Comm(mesh.pipeline_group, ledger), case.schedule, each, None, 29)
    tensor = TensorParallel(model, Comm(mesh.tensor_group, ledger))
    engine = SequenceParallel(Comm(mesh.sequence_group, ledger), layout=case.layout, tensor=tensor.comm)
    parallel = DataParallel(
        model, mesh, case.backend, tuple(model.layers), ledger=ledger, tensor=tensor, pipeline=pipeline
    )
    batches = []
    for index in stream_indices(0, STREAMS, mesh.data_rank, case.degrees.data):
        tokens, labels, weights, documents = stream(index)
        held = torch.cat([torch.arange(a, b) for a, b in engine.local_tokens(documents)])
        batches.append(Batch(tokens[held], labels[held], weights[held], engine.shard(documents)))
    schedule = Schedule(pipeline, len(batches), contextlib.nullcontext, torch.float64, torch.device("cpu"))
    for _ in range(2):  # the second step finds buffers, gathered parameters and tags of the first
        ledger.reset()
        model.zero_grad(set_to_none=True)
        with parallel.whole_step():
            loss = schedule.train(batches, SCALE)
        counts = {f"{label} {kind}": count.messages for (label, kind), count in ledger.counts.items()}
        parallel.finish_gradients()
    world = Comm(torch.distributed.group.WORLD)
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        kept = tensor.kept.get(name)
        gradient = whole(parameter.grad)
        found[name] = [
            (None if part is None else (kept.axis, part.start, part.stop), view.clone())  # type: ignore[union-attr]
            for view, part in local_ranges(gradient, kept)
        ]
    norm = parallel.gradient_norm()
    model.eval()
    evaluated = torch.tensor(schedule.evaluate(batches)[0], dtype=torch.float64)
    return {
        "gradients": found,
        "loss": world.all_reduce(loss, "test").wait(),
        "evaluated": world.all_reduce(evaluated, "test").wait(),
        "norm": norm,
        "counts": counts,
    }


def check(case: Case) -> list[dict[str, Any]]:
    reference = expected(case._replace(degrees=Degrees(), schedule="", backend="", layout="", recompute="none"))
    results = run_ranks(step, case.degrees.world_size, case=case)
    seen: set[str] = set()
    for rank, result in enumerate(results):
        for name, parts in result["gradients"].items():
            for place, actual in parts:
                whole_one = reference["gradients"][name]
                wanted = whole_one if place is None else whole_one.narrow(place[0], place[1], place[2] - place[1])
                assert_close(actual, wanted, f"gradient of {name} on rank {rank}")
            seen.add(name)
        assert_close(result["loss"], reference["loss"], f"loss on rank {rank}")
        assert_close(result["evaluated"], reference["loss"], f"evaluated loss on rank {rank}")
        assert_close(result["norm"], reference["norm"], f"gradient norm on rank {rank}")
    assert seen == set(reference["gradients"])
    return results


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_gives_the_gradients_of_one_process(schedule: str) -> None:
    check(Case(schedule=schedule))


def test_zero_bubble_sends_what_1f1b_sends() -> None:
    """Mamba-1's A comes from a parameter alone and enters a scan that communicates: the second half must not run it again."""
    counts = {}
    for schedule in ("1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble"):
        results = check(Case("memmamba", Degrees(pipeline=2, sequence=2), schedule))
        totals: dict[str, int] = {}
        for result in results:
            for label, number in result["counts"].items():
                if not label.startswith(("pipeline", "tied", "parameters", "gradients")):  # where stages lie decides these
                    totals[label] = totals.get(label, 0) + number
        counts[schedule] = totals
    assert all(found == counts["1f1b"] for found in counts.values()), counts


@pytest.mark.parametrize("schedule", ["1f1b", "zbv_zero_bubble"])
def test_recomputation_sends_nothing(schedule: str) -> None:
    plain, full = (
        [result["counts"] for result in check(Case("mom", Degrees(pipeline=2, sequence=2), schedule, recompute=mode))]
        for mode in ("none", "full")
    )
    assert plain == full


MORE = [
    Case("mom", Degrees(pipeline=2, sequence=2), "interleaved_1f1b"),
    Case("mom", Degrees(pipeline=2, sequence=2), "zbv_zero_bubble", ffn="moe"),
    Case(degrees=Degrees(data=2, pipeline=2)),
    Case(degrees=Degrees(data=2, pipeline=2), schedule="interleaved_zero_bubble"),
    Case(degrees=Degrees(data=2, pipeline=2), schedule="zbv_zero_bubble", backend="ddp"),
    Case("mamba2", Degrees(pipeline=2, tensor=2)),
    Case("mamba2", Degrees(pipeline=2, tensor=2), "zbv_zero_bubble", ffn="moe", tied=False),
    Case("gated_deltanet", Degrees(pipeline=2, sequence=2), layout="contiguous_per_document", recompute="full"),
    Case("attention", Degrees(pipeline=3), tied=False, layers=3),
    Case("memmamba", Degrees(pipeline=3), layers=3),
    Case("mom", Degrees(pipeline=2, sequence=2, tensor=2), "interleaved_zero_bubble"),
]


@pytest.mark.parametrize("case", MORE, ids=lambda case: case.name)
def test_beside_other_axes(case: Case) -> None:
    check(case)


def test_stages_are_cut_by_cost_not_by_number() -> None:
    assert split_by_cost([1.0] * 6, 3) == [range(2), range(2, 4), range(4, 6)]
    assert split_by_cost([1.0] * 6, 3, last=2.0) == [range(2), range(2, 5), range(5, 6)]  # 2, 3, 1 + 2
    assert split_by_cost([5.0, 1, 1, 1, 1, 1], 2) == [range(1), range(1, 6)]
    assert split_by_cost([1.0, 2.0], 2, last=9.0) == [range(1), range(1, 2)]  # a stage has a layer, however dear the head
