"""Planned and static execution are one job: gradients of step 1, and parameters after the last plain-SGD step.

Twenty steps in float32, as a person would compare two runs; fewer in float64, where one step tells. The static job is that of one
process, which tests/launcher and tests/quickstart hold other topologies to.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longhaul.parallel.planner import Plan
from tests.harness import run_ranks
from tests.harness.numerics import assert_close
from tests.planner.runs import PLANNED, arguments, job, write_documents

SOFTMAX, HYBRID, LINEAR, MOM = (
    {"model.pattern": pattern, "model.linear_mixer": mixer}
    for pattern, mixer in (("N", "mamba2"), ("LN", "gated_deltanet"), ("L", "linear_attention"), ("L", "mom"))
)
ONE_LAYER = {"model.num_layers": 1}
MEMMAMBA = {"model.pattern": "LN", "model.linear_mixer": "memmamba", "model.memmamba.block": 16, "model.memmamba.slots": 8}
PREFIX = {"model.linear_mixer": "jrt", "model.jrt.prefix_length": 9, "data.prefix_length": 9, "model.jrt.feature_dim": 3}
EXPERTS = {**HYBRID, "model.ffn": "moe", "model.moe.num_experts": 4, "model.moe.balance_weight": 0.2}
FEW = {"data.seq_length": 110, "train.global_batch_size": 1, "parallel.planner.memory_tokens": 60}

Result = dict[str, Any]
Static = Callable[..., Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("planned")
    write_documents(root / "corpus")
    return root


@pytest.fixture(scope="module")
def static(folder: Path) -> Static:
    """The job of one process, run once for all that are compared with it."""
    kept: dict[str, Result] = {}

    def of(values: dict[str, Any], dtype: torch.dtype) -> Result:
        values = {key: value for key, value in values.items() if not key.startswith("parallel.")}
        key = repr((sorted(values.items()), dtype))
        if key not in kept:
            kept[key] = run_ranks(job, 1, timeout=170, argv=arguments(folder, values), dtype=dtype)[0]
        return kept[key]

    return of


def compare(
    folder: Path, static: Static, world_size: int, values: dict[str, Any], dtype: torch.dtype = torch.float64
) -> list[Result]:
    """Every rank's gradients and parameters are those of the static run."""
    expected = static(values, dtype)
    found = run_ranks(job, world_size, timeout=170, argv=arguments(folder, {**PLANNED, **values}), dtype=dtype)
    for rank, result in enumerate(found):
        assert result["plans"] == found[0]["plans"] and result["losses"] == found[0]["losses"]
        for name, gradient in expected["first"].items():
            assert_close(result["first"][name], gradient, f"gradient of {name} on rank {rank} at step 1")
        for name, parameter in expected["parameters"].items():
            assert_close(result["parameters"][name], parameter, f"{name} on rank {rank} at the end")
    assert found[0]["losses"] == pytest.approx(expected["losses"], rel=1e-9 if dtype == torch.float64 else 1e-5)
    return found


def shapes(plans: list[Plan], world_size: int) -> tuple[set[int], bool]:
    """Degrees that occur, and whether some rank is idle in some micro-batch."""
    batches = [batch for plan in plans for batch in plan.micro_batches]
    degrees = {group.degree for batch in batches for group in batch.groups}
    return degrees, any(sum(group.degree for group in batch.groups) < world_size for batch in batches)


@pytest.mark.parametrize("world_size", [4, 8])
@pytest.mark.parametrize("model", [SOFTMAX, HYBRID, LINEAR, {**MOM, **ONE_LAYER}], ids=["softmax", "hybrid", "linear", "mom"])
def test_planned_is_the_static_job_after_20_steps(
    folder: Path, static: Static, world_size: int, model: dict[str, Any]
) -> None:
    memory = {"parallel.planner.memory_tokens": 480 // world_size}
    found = compare(folder, static, world_size, {**model, **memory}, torch.float32)
    losses = found[0]["losses"]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.1, "the comparison saw no training"
    degrees, _ = shapes(found[0]["plans"], world_size)
    assert {1, world_size} < degrees


@pytest.mark.parametrize(("model", "backend"), [(MOM, "fsdp"), (HYBRID, "ddp")], ids=["mom-fsdp", "hybrid-ddp"])
def test_ranks_without_a_group_take_part(folder: Path, static: Static, model: dict[str, Any], backend: str) -> None:
    """Three ranks make one block of two: the third has nothing to do beside a document that needs two."""
    values = {**model, **FEW, "train.steps": 3, "parallel.data_parallel_backend": backend}
    degrees, idle = shapes(compare(folder, static, 3, values)[0]["plans"], 3)
    assert degrees == {1, 2} and idle


@pytest.mark.parametrize("extra", ["tensor", "copies"])
def test_planned_with_tensor_groups_and_with_copies(folder: Path, static: Static, extra: str) -> None:
    """A place of a plan is two ranks that divide the heads; fsdp shards inside two copies."""
    key = "parallel.tensor_parallel_size" if extra == "tensor" else "parallel.data_parallel_replicate_size"
    memory = {"parallel.planner.memory_tokens": 240} if extra == "tensor" else {}
    found = compare(folder, static, 4, {**HYBRID, **memory, "train.steps": 2, key: 2})
    degrees, _ = shapes(found[0]["plans"], 4)
    assert len(degrees) > 1, "the comparison saw one kind of micro-batch only"


@pytest.mark.parametrize("backend", ["fsdp", "ddp"])
def test_planned_with_experts_on_other_ranks(folder: Path, static: Static, backend: str) -> None:
    """Tokens travel to experts in pairs of ranks, whatever groups they train in, and past ranks that have none."""
    slow = folder / "slow.yaml"  # links for which small groups are worth it
    slow.write_text("ranks: 4\nmemory_tokens: 100\nlinks: [{span: 4, bandwidth: 1.0e+9, latency: 0.05}]\n")
    values = {**EXPERTS, "data.seq_length": 200, "train.global_batch_size": 1, "train.steps": 3}
    values |= {"parallel.planner.cluster": slow, "parallel.planner.memory_tokens": 100}
    values |= {"parallel.expert_parallel_size": 2, "parallel.data_parallel_backend": backend}
    degrees, idle = shapes(compare(folder, static, 4, values)[0]["plans"], 4)
    assert degrees == {1, 4} and idle


def test_documents_that_began_earlier_keep_their_positions(folder: Path, static: Static) -> None:
    """A mixer that reads positions as they are: blocks are counted from a document's start."""
    small = {"data.seq_length": 50, "train.global_batch_size": 8, "train.steps": 2, "parallel.planner.memory_tokens": 120}
    found = compare(folder, static, 3, {**MEMMAMBA, **small})
    groups = [set(group.documents) & set(continued) for plan, continued in zip(found[0]["plans"], found[0]["continued"])
              for batch in plan.micro_batches for group in batch.groups]  # fmt: skip
    assert max(map(len, groups)) == 1 and sum(map(len, groups)) > 4


def test_prefixes_of_any_number_of_streams(folder: Path, static: Static) -> None:
    compare(folder, static, 3, {**PREFIX, "data.seq_length": 120, "train.global_batch_size": 3, "train.steps": 1})
