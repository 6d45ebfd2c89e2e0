"""Degrees, placement and the groups that the mesh makes."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from longhaul.models.errors import UserError
from longhaul.parallel.mesh import Degrees, ParallelMesh
from longhaul.parallel.runtime import Runtime
from tests.harness import RankError, run_ranks


def test_data_degree_is_derived() -> None:
    assert Degrees.resolve(8, sequence=2) == Degrees(data=4, sequence=2)
    assert Degrees.resolve(1) == Degrees()


BAD = [
    (6, {"sequence": 4}, r"= 4 do not divide the world size 6"),
    (8, {"data": 2, "sequence": 2}, r"data 2 x pipeline 1 x sequence 2 x tensor 1 = 4 are not the world size 8"),
    (2, {"sequence": 0}, r"parallel.sequence_parallel_size is 0"),
    (2, {"data": -1}, r"parallel.data_parallel_size is -1"),
]


@pytest.mark.parametrize(("world_size", "degrees", "message"), BAD)
def test_impossible_degrees(world_size: int, degrees: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Degrees.resolve(world_size, **degrees)


def test_one_process_has_no_groups() -> None:
    mesh = ParallelMesh(Degrees())
    assert (mesh.sequence_group, mesh.data_group, mesh.gradient_group, mesh.gradient_mesh) == (None, None, None, None)
    assert mesh.describe() == "1 processes = data 1 x pipeline 1 x sequence 1 x tensor 1"


def members(rank: int, world_size: int, degrees: Degrees) -> dict[str, Any]:
    mesh = ParallelMesh(degrees, rank)
    groups = {"sequence": mesh.sequence_group, "data": mesh.data_group, "gradient": mesh.gradient_group}
    found: dict[str, Any] = {
        name: None if group is None else dist.get_process_group_ranks(group) for name, group in groups.items()
    }
    value = torch.tensor([float(rank)])
    for name, group in groups.items():
        if group is not None:
            total = value.clone()
            dist.all_reduce(total, group=group)
            assert total.item() == sum(found[name])
    return {**found, "data_rank": mesh.data_rank, "sequence_rank": mesh.sequence_rank, "text": mesh.describe()}


@pytest.mark.parametrize("degrees", [Degrees(data=2), Degrees(sequence=3), Degrees(data=2, sequence=2)])
def test_groups(degrees: Degrees) -> None:
    size = degrees.world_size
    for rank, found in enumerate(run_ranks(members, size, degrees=degrees)):
        sequence, data = rank % degrees.sequence, rank // degrees.sequence
        assert (found["data_rank"], found["sequence_rank"]) == (data, sequence)
        own = [data * degrees.sequence + each for each in range(degrees.sequence)]
        assert found["sequence"] == (own if degrees.sequence > 1 else None), "sequence ranks are neighbours"
        across = [each * degrees.sequence + sequence for each in range(degrees.data)]
        assert found["data"] == (across if degrees.data > 1 else None)
        assert found["gradient"] == list(range(size))


def test_placement_is_told() -> None:
    mesh = object.__new__(ParallelMesh)  # eight ranks on paper
    mesh.degrees = Degrees(data=2, sequence=4)
    mesh.grid = torch.arange(8).reshape(mesh.degrees.shape)
    assert mesh.describe().splitlines() == [
        "8 processes = data 2 x pipeline 1 x sequence 4 x tensor 1",
        "data groups: [0 4] [1 5] [2 6] [3 7]",
        "sequence groups: [0 1 2 3] [4 5 6 7]",
    ]


def agree(rank: int, world_size: int) -> dict[str, Any]:
    runtime = Runtime(rank, world_size, device="cpu")
    said = {
        "sum": runtime.sum([1.0, float(rank)]),
        "any": (runtime.any(rank == 1), runtime.any(False)),
        "maximum": runtime.maximum(10 * rank),
        "main": runtime.on_main(lambda: {"from": rank}),
    }
    runtime.barrier()
    for mistake in (
        lambda: runtime.agree_on_error(UserError("one is wrong") if rank == 1 else None),
        lambda: runtime.on_main(fail),
    ):
        with pytest.raises(UserError, match="wrong"):
            mistake()
    runtime.agree_on_error(None)
    runtime.close()
    assert dist.is_initialized(), "whoever made the group ends it"
    return said


def fail() -> None:
    raise UserError("main is wrong")


def test_processes_agree() -> None:
    for said in run_ranks(agree, 2):
        assert said == {"sum": [2.0, 1.0], "any": (True, False), "maximum": 10, "main": {"from": 0}}


def test_one_process_agrees_with_itself() -> None:
    runtime = Runtime(device="cpu")
    assert runtime.sum([2.0]) == [2.0]
    assert runtime.on_main(lambda: 3) == 3
    assert not runtime.any(False)
    with pytest.raises(UserError, match="wrong"):
        runtime.agree_on_error(UserError("wrong"))
    runtime.close()


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Runtime().device.type == "cpu"
    with pytest.raises(UserError, match=r"train.device is cuda, but torch sees no GPU"):
        Runtime(device="cuda")


def levels(rank: int, world_size: int, inner: int) -> list[list[int]]:
    groups = ParallelMesh(Degrees(sequence=world_size), rank).sequence_levels(inner)
    return [[] if group is None else dist.get_process_group_ranks(group) for group in groups]


def test_a_sequence_group_has_two_levels() -> None:
    assert run_ranks(levels, 4, inner=2) == [[[0, 1], [0, 2]], [[0, 1], [1, 3]], [[2, 3], [0, 2]], [[2, 3], [1, 3]]]
    assert run_ranks(levels, 4, inner=4)[1] == [[0, 1, 2, 3], []]
    with pytest.raises(RankError, match=r"sequence_inner_size 3 does not divide .* 4: give one of 1, 2, 4"):
        run_ranks(levels, 4, inner=3)
