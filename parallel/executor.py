"""Planned micro-batches on this rank: the groups they run in, and this rank's part of their streams.

A plan names ranks by their place on the mesh's data axis (a place is a tensor group, where ranks divide heads). Blocks are
aligned, so a place belongs to at most `log2(places) + 1` of them; each gets its process group and engine when a plan first
names it, and keeps them. Switching from one to another is choosing what a shard points at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from longhaul.models.errors import UserError
from longhaul.models.ops.attention import Mask
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import SequenceShard

from .comm import Comm, Ledger, Wire
from .engine import SequenceParallel
from .layout import SequenceLayout
from .mesh import ParallelMesh
from .planner.plan import GroupPlan, MicroBatch, Plan


@dataclass(frozen=True)
class Placed:
    """This rank's part of a micro-batch.

    Attributes:
        documents: the group's, by their index in the step, in stream order; none where the rank has no group.
        ranges: tokens of the group's stream that are held here, in part order.
        shard: the window on the rest of the stream.
    """

    documents: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]
    shard: SequenceShard

    @property
    def idle(self) -> bool:
        """The rank has no group in this micro-batch."""
        return not self.documents


class Executor:
    """Groups and shards of plans.

    Args:
        mesh: whose data axis is planned.
        make_engine: the engine of a block, from the block's group; the same options for every block.
        device: of the shards.
        ledger: where traffic is counted.
        wire: an emulated slower link, in every block.
    """

    def __init__(
        self,
        mesh: ParallelMesh,
        make_engine: Callable[[Comm], SequenceParallel] = SequenceParallel,
        *,
        device: torch.device | str = "cpu",
        ledger: Ledger | None = None,
        wire: Wire | None = None,
    ) -> None:
        self.mesh, self.make_engine = mesh, make_engine
        self.device, self.wire = torch.device(device), wire
        self.ledger = ledger if ledger is not None else Ledger()
        self._alone = make_engine(Comm(None, self.ledger))
        self._engines: dict[range, SequenceParallel | None] = {}
        self._recurrent = False
        self._everyone = Comm(dist.group.WORLD if mesh.degrees.world_size > 1 else None, self.ledger)

    @property
    def largest(self) -> range:
        """The largest block: the first power of two places."""
        return range(1 << (self.mesh.degrees.data.bit_length() - 1))

    def engine(self, ranks: range) -> SequenceParallel | None:
        """The engine of a block, None outside of it; every process calls this in the same order."""
        if ranks not in self._engines:
            group = self.mesh.block(ranks.start, len(ranks))
            inside = self.mesh.data_rank in ranks
            engine = self.make_engine(Comm(group, self.ledger, self.wire)) if inside else None
            if engine is not None and self._recurrent:
                engine.prepare(self.device)
            self._engines[ranks] = engine
        return self._engines[ranks]

    def check(self, recurrent: bool, masks: Iterable[Mask] = ()) -> None:
        """Refuse, with a `UserError` and before the first step, a model that these engines cannot serve.

        Args:
            recurrent, masks: as `LanguageModel.needs` says.
        """
        self._recurrent = recurrent
        engine = self.engine(self.largest)
        if engine is not None:
            engine.check(recurrent, masks)

    def prepare(self, plan: Plan) -> None:
        """Make the groups that `plan` is the first to name; every process calls this with the same plan."""
        for batch in plan.micro_batches:
            for group in batch.groups:
                self.engine(group.ranks)

    def agree(self, plan: Plan, lengths: Sequence[int]) -> None:
        """Refuse to start a step that ranks have planned differently: they would wait for each other for ever.

        Raises:
            UserError: on every rank.
        """
        steps = [[(group.ranks, group.documents, group.cuts) for group in batch.groups] for batch in plan.micro_batches]
        digest = hashlib.sha256(repr((steps, tuple(lengths))).encode()).digest()
        number = int.from_bytes(digest[:7], "little")
        both = torch.tensor([number, -number], dtype=torch.int64, device=self.device)
        largest, least = self._everyone.all_reduce(both, "plan", dist.ReduceOp.MAX).wait().tolist()
        if largest != -least:
            raise UserError(
                "The processes made different plans of one step, so they see different documents: compare data.paths and "
                "data.cache_dir on all machines."
            )

    def slowest(self, seconds: Sequence[float]) -> list[float]:
        """The largest of each time over all ranks, in whole microseconds: what every rank may learn from."""
        times = torch.tensor([round(1e6 * value) for value in seconds], dtype=torch.int64, device=self.device)
        found = self._everyone.all_reduce(times, "timers", dist.ReduceOp.MAX).wait()
        return [1e-6 * value for value in found.tolist()]

    def times_of_places(self, seconds: float) -> list[float]:
        """What a piece of work took on each place, in whole nanoseconds; a place is as slow as its slowest rank."""
        own = torch.tensor(round(1e9 * seconds), dtype=torch.int64, device=self.device)
        found = self._everyone.all_gather(own, "timers").wait().reshape(self.mesh.degrees.data, -1)
        return [1e-9 * value for value in found.amax(1).tolist()]

    def place(self, batch: MicroBatch, lengths: Sequence[int], positions: Sequence[int]) -> Placed:
        """This rank's part of a micro-batch of a plan that was prepared.

        Args:
            lengths: tokens of every document of the step.
            positions: position of each one's first token in its whole document. One that began in an earlier stream comes
                first in its group's, where its positions go on; its state starts anew. Plans keep such documents apart.
        """
        place = self.mesh.data_rank
        group = next((group for group in batch.groups if place in group.ranks), None)
        if group is None:
            return Placed((), (), self.empty())
        members = tuple(sorted(group.documents, key=lambda index: not positions[index]))
        assert not any(positions[index] for index in members[1:]), "only a stream's first document may begin above position 0"
        bounds = [0]
        for index in members:
            bounds.append(bounds[-1] + lengths[index])
        documents = Documents(bounds, positions[members[0]])
        engine = self._engines[group.ranks]
        assert engine is not None, "the plan was prepared"
        layout = self._cut(engine, group, documents)
        return Placed(members, layout.parts[engine.comm.rank], engine.shard(documents, self.device, layout=layout))

    def empty(self, documents: Documents | None = None, keep_state: bool = False) -> SequenceShard:
        """No tokens, in a group of this rank's own; `documents` says whether a state flows in."""
        first = documents.first_position if documents is not None else 0
        return self._alone.shard(Documents((0,), first), self.device, keep_state)

    def _cut(self, engine: SequenceParallel, group: GroupPlan, documents: Documents) -> SequenceLayout:
        """The run's layout; a contiguous one takes the plan's cuts, so that slow ranks may hold less."""
        if engine.layout_name != "contiguous":
            return engine.layout(documents)
        held = [stop - start for start, stop in zip(group.cuts, group.cuts[1:])]
        return SequenceLayout.contiguous(documents.num_tokens, group.degree, held)
