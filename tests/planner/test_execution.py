"""Planned and static execution are one job: gradients of step 1, and parameters after 20 plain-SGD steps."""

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("planned")
    write_documents(root / "corpus")
    return root


def run(folder: Path, world_size: int, values: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    return run_ranks(job, world_size, timeout=170, argv=arguments(folder, values), **options)


def check(found: list[dict[str, Any]], static: dict[str, Any]) -> None:
    """Every rank's gradients and parameters are those of the static run."""
    for rank, result in enumerate(found):
        assert result["plans"] == found[0]["plans"] and result["losses"] == found[0]["losses"]
        for name, gradient in static["first"].items():
            assert_close(result["first"][name], gradient, f"gradient of {name} on rank {rank} at step 1")
        for name, parameter in static["parameters"].items():
            assert_close(result["parameters"][name], parameter, f"{name} on rank {rank} at the end")
    assert static["losses"][-1] < static["losses"][0] - 0.1, "the comparison saw no training"


def shapes(plans: list[Plan], world_size: int) -> tuple[set[int], bool]:
    """Degrees that occur, and whether some rank is idle in some micro-batch."""
    batches = [batch for plan in plans for batch in plan.micro_batches]
    degrees = {group.degree for batch in batches for group in batch.groups}
    return degrees, any(sum(group.degree for group in batch.groups) < world_size for batch in batches)


@pytest.mark.parametrize(
    ("model", "backend"),
    [(SOFTMAX, "fsdp"), (HYBRID, "fsdp"), (LINEAR, "ddp"), (MOM, "fsdp")],
    ids=["softmax", "hybrid", "linear-ddp", "mom"],
)
def test_planned_is_the_static_job_on_4_ranks(folder: Path, model: dict[str, Any], backend: str) -> None:
    static = run(folder, 1, model)[0]
    found = run(folder, 4, {**model, **PLANNED, "parallel.data_parallel_backend": backend})
    check(found, static)
    degrees, _ = shapes(found[0]["plans"], 4)
    assert len(degrees) > 1, "the comparison saw one kind of micro-batch only"


@pytest.mark.parametrize(("model", "backend"), [(MOM, "fsdp"), (HYBRID, "ddp")], ids=["mom-fsdp", "hybrid-ddp"])
def test_ranks_without_a_group_take_part(folder: Path, model: dict[str, Any], backend: str) -> None:
    """Three ranks make one block of two: the third has nothing to do beside a document that needs two."""
    few = {**model, "data.seq_length": 110, "train.global_batch_size": 1, "train.steps": 6}
    static = run(folder, 1, few, dtype=torch.float64)[0]
    small = {"parallel.planner.memory_tokens": 60, "parallel.data_parallel_backend": backend}
    found = run(folder, 3, {**few, **PLANNED, **small}, dtype=torch.float64)
    check(found, static)
    degrees, idle = shapes(found[0]["plans"], 3)
    assert degrees == {1, 2} and idle


@pytest.mark.parametrize("extra", ["tensor", "copies"])
def test_planned_with_tensor_groups_and_with_copies(folder: Path, extra: str) -> None:
    """A place of a plan is two ranks that divide the heads; fsdp shards inside two copies."""
    few = {**HYBRID, "train.steps": 4}
    static = run(folder, 1, few, dtype=torch.float64)[0]
    key = "parallel.tensor_parallel_size" if extra == "tensor" else "parallel.data_parallel_replicate_size"
    memory = {"parallel.planner.memory_tokens": 240} if extra == "tensor" else {}
    found = run(folder, 4, {**few, **PLANNED, **memory, key: 2}, dtype=torch.float64)
    for result in found:
        assert result["plans"] == found[0]["plans"]
        assert result["losses"] == pytest.approx(static["losses"], rel=1e-9)
    degrees, _ = shapes(found[0]["plans"], 4)
    assert len(degrees) > 1, "the comparison saw one kind of micro-batch only"


def test_planned_is_the_static_job_on_8_ranks_in_float64(folder: Path) -> None:
    few = {**HYBRID, "train.steps": 6, "data.seq_length": 500}
    static = run(folder, 1, few, dtype=torch.float64)[0]
    found = run(folder, 8, {**few, **PLANNED, "parallel.planner.memory_tokens": 60}, dtype=torch.float64)
    check(found, static)
    degrees, _ = shapes(found[0]["plans"], 8)
    assert {1, 8} < degrees
