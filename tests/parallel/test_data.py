"""Data-parallel backends: copies of sharded parameters, types of what travels, bytes, and the same step as one process."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longhaul.launcher.config import ParallelConfig
from longhaul.models.errors import UserError
from longhaul.models.ops.segments import Documents
from longhaul.parallel.comm import Comm, Ledger
from longhaul.parallel.data import DataParallel
from longhaul.parallel.engine import SequenceParallel
from longhaul.parallel.mesh import Degrees, ParallelMesh
from tests.harness import run_ranks
from tests.harness.numerics import assert_close, assert_trees_close
from tests.launcher.runs import tiny, train_rank, write_corpus
from tests.launcher.test_loss import model, oracle, run

COPIES = [
    Degrees(data=4, replicate=2),
    Degrees(data=2, sequence=2, replicate=2),
    Degrees(sequence=4, replicate=2),
]


@pytest.mark.parametrize("degrees", COPIES, ids=lambda degrees: f"dp{degrees.data}sp{degrees.sequence}")
def test_copies_of_shards_take_the_same_steps(degrees: Degrees) -> None:
    expected = oracle("some", 0.1)
    for rank, found in enumerate(run_ranks(run, 4, degrees=degrees, style="fsdp", mask="some", clip=0.1, recompute="none")):
        for name in ("losses", "norms"):
            numbers = (torch.tensor(values[name], dtype=torch.float64) for values in (found, expected))
            assert_close(*numbers, f"{name} on rank {rank}")
        assert_trees_close(found["parameters"], expected["parameters"], f"parameters on rank {rank}")


def step_of_four(rank: int, world_size: int, degrees: Degrees, style: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """One backward of a loss that every rank has a quarter of: types seen, gradients and bytes."""
    mesh, ledger = ParallelMesh(degrees, rank), Ledger()
    lm = model().float()
    parallel = DataParallel(lm, mesh, style, blocks=tuple(lm.layers), parameter_dtype=dtype, ledger=ledger)
    block, seen = lm.layers[0], {}
    child = next(m for m in block.modules() if m is not block and list(m.parameters(recurse=False)))
    child.register_forward_pre_hook(lambda module, inputs: seen.update(inside=next(module.parameters()).dtype))
    shard = SequenceParallel(Comm(mesh.sequence_group)).shard(Documents((0, 16)))
    tokens = torch.arange(shard.num_tokens) % 7
    parallel(tokens, shard, labels=tokens, weights=torch.full((len(tokens),), 0.01)).loss_sum.backward()
    counts = {f"{label} {kind}": count.bytes for (label, kind), count in ledger.counts.items()}
    gradient = next(lm.parameters()).grad
    assert gradient is not None
    shard_size = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in lm.parameters())
    return {**seen, "gradient": gradient.dtype, "trained": next(lm.parameters()).dtype, "bytes": counts, "held": shard_size}


BF16 = torch.bfloat16
STYLES = [  # backend, copies, processes that share one, type of what is gathered
    ("fsdp", 1, 4, None),
    ("fsdp", 1, 4, BF16),
    ("fsdp", 2, 2, BF16),
    ("ddp", 1, 1, None),
]


@pytest.mark.parametrize(("style", "copies", "sharing", "dtype"), STYLES, ids=("fsdp", "fsdp bf16", "hsdp bf16", "ddp"))
def test_types_and_bytes_of_what_travels(style: str, copies: int, sharing: int, dtype: torch.dtype | None) -> None:
    """Gathers in the type asked for; reductions, trained weights and their gradients in float32."""
    degrees = Degrees(data=2, sequence=2, replicate=copies)
    size = sum(parameter.numel() for parameter in model().parameters())
    for found in run_ranks(step_of_four, 4, degrees=degrees, style=style, dtype=dtype):
        assert found["inside"] == (dtype or torch.float32)
        assert found["gradient"] == found["trained"] == torch.float32
        rows = 1.05 if sharing > 1 else 1.0  # padded to the processes
        assert size / sharing <= found["held"] * rows <= size / sharing * rows * rows
        counts = dict(found["bytes"])
        if style == "ddp":
            assert counts == {"gradients all_reduce": 2 * 3 * 4 * size // 4}
            continue
        width = (dtype or torch.float32).itemsize
        scattered = counts.pop("gradients reduce_scatter")
        assert (sharing - 1) * 4 * size / sharing <= scattered <= (sharing - 1) * 4 * size / sharing * 1.05
        assert counts.pop("parameters all_gather") >= scattered * width / 4, "in the forward at least"
        if copies > 1:  # 2 (R - 1) / R of each shard
            assert counts.pop("gradients all_reduce") == scattered // (sharing - 1)
        assert not counts


def places(rank: int, world_size: int, degrees: Degrees) -> list[str]:
    return ParallelMesh(degrees, rank).describe().splitlines()


def test_copies_are_told_and_refused_where_they_do_not_fit() -> None:
    told = "2 copies of the parameters, sharded over: [0 1] [2 3]"
    assert run_ranks(places, 4, degrees=Degrees(data=4, replicate=2))[0][-1] == told
    assert Degrees.resolve(8, sequence=2, replicate=4) == Degrees(4, 1, 2, 1, 4)
    for copies in (3, 8, 0):
        with pytest.raises(UserError, match=rf"data_parallel_replicate_size is {copies}, but data 4 x sequence 2 = 8 .* 1, 2, 4"):
            Degrees.resolve(8, sequence=2, replicate=copies)
    with pytest.raises(UserError, match=r"replicate_size 2 needs parallel\.data_parallel_backend fsdp, not ddp"):
        ParallelConfig(data_parallel_backend="ddp", data_parallel_replicate_size=2)


def test_a_run_of_copies_goes_on_without_them(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")

    def config(name: str, **parallel: Any) -> Any:
        return tiny(
            tmp_path,
            checkpoint={"folder": str(tmp_path / name)},
            parallel=parallel,
            train={"global_batch_size": 4},
        )

    copies = config("copies", data_parallel_replicate_size=2)
    (first, _), *_ = run_ranks(train_rank, 4, config=copies, stop_at=3)
    assert first.step == 3
    _, going_on = train_rank(0, 1, replace(copies, parallel=ParallelConfig()))
    _, never_stopped = train_rank(0, 1, config("whole"))
    assert_trees_close(going_on, never_stopped, "parameters")
