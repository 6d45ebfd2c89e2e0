"""Who works with whom: the only maker of process groups.

Letters: `D` data, `p` pipeline, `P` sequence, `t` tensor parallel processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longhaul.models.errors import UserError

AXES = ("data", "pipeline", "sequence", "tensor")


@dataclass(frozen=True)
class Degrees:
    """Processes along each axis of the mesh."""

    data: int = 1
    pipeline: int = 1
    sequence: int = 1
    tensor: int = 1
    replicate: int = 1
    """Copies of the sharded parameters, which divide data x sequence; no axis of its own."""
    expert: int = 1
    """Processes that share experts, which divide data x sequence; no axis of its own."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.data, self.pipeline, self.sequence, self.tensor

    @property
    def world_size(self) -> int:
        return self.data * self.pipeline * self.sequence * self.tensor

    @classmethod
    def resolve(
        cls,
        world_size: int,
        *,
        data: int | None = None,
        pipeline: int = 1,
        sequence: int = 1,
        tensor: int = 1,
        replicate: int = 1,
        expert: int = 1,
    ) -> Degrees:
        """Check that degrees make `world_size` processes; `data` is what the others leave over if None.

        Raises:
            UserError: a degree is below 1, the product is not the world size, or copies do not fit.
        """
        given = {"data": data, "pipeline": pipeline, "sequence": sequence, "tensor": tensor}
        for name, size in given.items():
            if size is not None and size < 1:
                raise UserError(f"parallel.{name}_parallel_size is {size}: give 1 or more.")
        others = pipeline * sequence * tensor
        product = " x ".join(f"{name} {size}" for name, size in given.items() if size is not None and name != "data")
        if data is None:
            if world_size % others:
                raise UserError(
                    f"The parallel degrees {product} = {others} do not divide the world size {world_size}: start a "
                    f"multiple of {others} processes (torchrun --nproc-per-node) or change the degrees."
                )
            data = world_size // others
        elif data * others != world_size:
            raise UserError(
                f"The parallel degrees data {data} x {product} = {data * others} are not the world size {world_size}: "
                f"start {data * others} processes (torchrun --nproc-per-node) or change the degrees; "
                "data_parallel_size may be left out."
            )
        sharing = data * sequence
        if replicate < 1 or sharing % replicate or replicate == sharing > 1:
            fitting = ", ".join(str(n) for n in range(1, sharing) if sharing % n == 0) or "1"
            raise UserError(
                f"parallel.data_parallel_replicate_size is {replicate}, but data {data} x sequence {sequence} = {sharing} "
                f"processes hold the parameters: give one of {fitting}; for whole copies on every process use "
                "parallel.data_parallel_backend ddp."
            )
        if expert < 1 or sharing % expert:
            fitting = ", ".join(str(n) for n in range(1, sharing + 1) if sharing % n == 0)
            raise UserError(
                f"parallel.expert_parallel_size is {expert}, but experts are shared among data {data} x sequence {sequence} = "
                f"{sharing} processes: give one of {fitting}."
            )
        return cls(data, pipeline, sequence, tensor, replicate, expert)


class ParallelMesh:
    """The grid of processes and its named groups.

    Ranks are laid out as `arange(world).reshape(D, p, P, t)`: the last axis changes fastest. What talks most is most
    adjacent: tensor, then sequence ranks are neighbours inside a node, data-parallel copies are farthest apart. With 8
    ranks, D = 2 and P = 4, sequence groups are [0 1 2 3] and [4 5 6 7], data groups [0 4] [1 5] [2 6] [3 7].

    Every process of the job makes the mesh, in the same order. A group of one process is None: nothing is sent in it.

    Args:
        degrees: processes along each axis.
        rank: of this process; 0 if there is only one.
        device_type: "cpu" or "cuda".
    """

    def __init__(self, degrees: Degrees, rank: int = 0, device_type: str = "cpu") -> None:
        assert 0 <= rank < degrees.world_size, f"rank {rank} is not one of {degrees.world_size}"
        self.degrees, self.rank = degrees, rank
        self.grid = torch.arange(degrees.world_size).reshape(degrees.shape)
        self.coordinates: dict[str, int] = dict(zip(AXES, (self.grid == rank).nonzero()[0].tolist(), strict=True))
        self.device_mesh: DeviceMesh | None = None
        self.gradient_mesh: DeviceMesh | None = None
        """One axis, data x sequence: parameters are alike on it, and gradients are summed over it."""
        self.shard_mesh: DeviceMesh | None = None
        """`gradient_mesh`, or the same processes as copies x shards: fsdp shards along the last axis, copies along the first."""
        self.sequence_group: dist.ProcessGroup | None = None
        """Shares the tokens of a stream."""
        self.data_group: dist.ProcessGroup | None = None
        """Reads different streams."""
        self.tensor_group: dist.ProcessGroup | None = None
        """Holds the same tokens, with other heads."""
        self.pipeline_group: dist.ProcessGroup | None = None
        """Holds the same tokens of the same streams, with other layers."""
        self.gradient_group: dist.ProcessGroup | None = None
        """The group of `gradient_mesh`."""
        self._blocks: dict[tuple[int, int], dist.ProcessGroup | None] = {}
        self.shard_group: dist.ProcessGroup | None = None
        """Holds one copy of the parameters between its members; without copies, the gradient group."""
        self.replicate_group: dist.ProcessGroup | None = None
        """Holds the same shard of every copy."""
        self.expert_group: dist.ProcessGroup | None = None
        """Neighbours of the gradient group, each with other experts."""
        self.expert_copies_mesh: DeviceMesh | None = None
        """Holds the same experts: what of the gradient group has this process's place in its expert group."""
        self.expert_copies_group: dist.ProcessGroup | None = None
        """The group of `expert_copies_mesh`, if it has more than one member."""
        if degrees.world_size > 1:
            self._make_groups(device_type)

    def _make_groups(self, device_type: str) -> None:
        self.device_mesh = init_device_mesh(device_type, self.degrees.shape, mesh_dim_names=AXES)
        if self.degrees.sequence > 1:
            self.sequence_group = self.device_mesh.get_group("sequence")
        if self.degrees.data > 1:
            self.data_group = self.device_mesh.get_group("data")
        if self.degrees.tensor > 1:
            self.tensor_group = self.device_mesh.get_group("tensor")
        if self.degrees.pipeline > 1:
            self.pipeline_group = self.device_mesh.get_group("pipeline")
        if self.degrees.sequence > 1 and self.degrees.data > 1:
            self.gradient_mesh = self.device_mesh["data", "sequence"]._flatten("gradient")
        elif self.degrees.sequence > 1 or self.degrees.data > 1:
            self.gradient_mesh = self.device_mesh["sequence" if self.degrees.sequence > 1 else "data"]
        if self.gradient_mesh is not None:
            self.gradient_group = self.gradient_mesh.get_group()
            self.shard_mesh, self.shard_group = self.gradient_mesh, self.gradient_group
            if self.degrees.replicate > 1:
                sizes = self.degrees.replicate, self.gradient_mesh.size() // self.degrees.replicate
                self.shard_mesh = self.gradient_mesh._unflatten(0, sizes, ("replicate", "shard"))
                self.replicate_group, self.shard_group = (self.shard_mesh.get_group(name) for name in ("replicate", "shard"))
            if self.degrees.expert > 1:
                sizes = self.gradient_mesh.size() // self.degrees.expert, self.degrees.expert
                experts = self.gradient_mesh._unflatten(0, sizes, ("expert_copies", "expert"))
                self.expert_group, self.expert_copies_mesh = experts.get_group("expert"), experts["expert_copies"]
                if sizes[0] > 1:
                    self.expert_copies_group = self.expert_copies_mesh.get_group()

    def sequence_levels(self, inner: int) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
        """Groups of `inner` neighbours inside a sequence group, and of the ranks with one index in theirs.

        Every process of the job calls this, in the same order. A group of one process is None.

        Raises:
            UserError: `inner` does not divide the sequence group.
        """
        size = self.degrees.sequence
        if inner < 1 or size % inner:
            raise UserError(
                f"parallel.sequence_inner_size {inner} does not divide parallel.sequence_parallel_size {size}: "
                f"give one of {', '.join(str(n) for n in range(1, size + 1) if size % n == 0)}."
            )
        rows = torch.tensor(self.members("sequence")).reshape(-1, size // inner, inner)
        levels: list[dist.ProcessGroup | None] = []
        for groups in (rows.reshape(-1, inner), rows.transpose(1, 2).reshape(-1, size // inner)):
            own = None
            for ranks in groups.tolist() if groups.shape[1] > 1 else []:
                group = dist.new_group(ranks)
                own = group if self.rank in ranks else own
            levels.append(own)
        return levels[0], levels[1]

    def block(self, first: int, degree: int) -> dist.ProcessGroup | None:
        """The group of places `first .. first + degree` on the data axis, made once: for micro-batches planned one by one.

        Every process of the job calls this, in the same order. None for a block of one place, and outside of the block.
        """
        assert first % degree == 0 and first + degree <= self.degrees.data, f"no aligned block {first} + {degree}"
        if (first, degree) not in self._blocks:
            own = None
            if degree == self.degrees.data:
                own = self.data_group
            elif degree > 1:
                for row in self.members("data"):
                    group = dist.new_group(row[first : first + degree])
                    own = group if self.rank in row[first : first + degree] else own
            self._blocks[first, degree] = own
        return self._blocks[first, degree]

    @property
    def data_rank(self) -> int:
        """Which streams this process reads."""
        return self.coordinates["data"]

    @property
    def sequence_rank(self) -> int:
        """Which tokens of a stream this process holds."""
        return self.coordinates["sequence"]

    def members(self, axis: str) -> list[list[int]]:
        """The ranks of every group along `axis`."""
        rows = self.grid.movedim(AXES.index(axis), -1).reshape(-1, getattr(self.degrees, axis))
        groups: list[list[int]] = rows.tolist()
        return groups

    def describe(self) -> str:
        """The placement, for a person: sizes, then the members of each group."""
        sizes = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, self.degrees.shape, strict=True))
        lines = [f"{self.degrees.world_size} processes = {sizes}"]
        for axis in AXES:
            if getattr(self.degrees, axis) > 1:
                lines.append(_listed(f"{axis} groups", self.members(axis)))
        if self.degrees.replicate > 1:
            sharing = self.degrees.data * self.degrees.sequence // self.degrees.replicate
            shards = self.grid.permute(1, 3, 0, 2).reshape(-1, sharing)
            lines.append(_listed(f"{self.degrees.replicate} copies of the parameters, sharded over", shards.tolist()))
        if self.degrees.expert > 1:
            lines.append(_listed("expert groups", self.grid.permute(1, 3, 0, 2).reshape(-1, self.degrees.expert).tolist()))
        return "\n".join(lines)


def _listed(title: str, groups: list[list[int]]) -> str:
    shown = " ".join("[" + " ".join(map(str, group)) + "]" for group in groups[:8])
    return f"{title}: {shown}" + (f" and {len(groups) - 8} more" if len(groups) > 8 else "")
