"""What `bench planner` runs on ranks: planned steps whose computing is slept, and whose communication is real.

Legend: n tokens of a rank, P ranks of a group, D model width.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longhaul.models.ops.affine import AffineMap, Constant
from longhaul.models.ops.segments import Documents
from longhaul.parallel.comm import Wire
from longhaul.parallel.engine import SequenceParallel
from longhaul.parallel.executor import Executor
from longhaul.parallel.layout import SequenceLayout
from longhaul.parallel.mesh import Degrees, ParallelMesh
from longhaul.parallel.planner import MicroBatch, Plan
from longhaul.parallel.runtime import Runtime

FORWARD = 1 / 3  # of a layer's time; the rest is its backward
HEAD = "head"
THIN = 64  # one in so many bytes of an all-to-all is really sent; the emulated wire takes the time of them all


@dataclass(frozen=True)
class Links:
    """Emulated: delay in seconds, bytes a second inside of nodes of `node` ranks, and across.

    `slow`: of slow motion. Sleeps and wire take so many times their time, and what is measured is divided by it, so that the
    machine's own cost of a collective among more ranks than cores counts that much less.
    """

    node: int
    delay: float
    inside: float
    across: float
    slow: float = 1.0

    def wire(self, ranks: int, thin: int = 1) -> Wire:
        """Of a group of so many ranks, for messages of which one in `thin` bytes is sent."""
        return Wire(self.delay * self.slow, (self.inside if ranks <= self.node else self.across) / self.slow / thin)


@dataclass(frozen=True)
class Job:
    """Steps of one contestant.

    Attributes:
        name: of the contestant.
        plans: one a step.
        seconds: by step, micro-batch and group: what each letter of the pattern, and the head, takes on each rank.
    """

    name: str
    plans: tuple[Plan, ...]
    seconds: tuple[tuple[tuple[dict[str, float], ...], ...], ...]


@dataclass(frozen=True)
class Shape:
    """Of the model: letters of its layers, heads, width."""

    layers: str
    heads: int
    width: int


Times = list[list[float]]  # of every micro-batch of every step


def measure(
    runtime: Runtime, shape: Shape, links: Links, exchange: str, jobs: Sequence[Job], tell: bool = False
) -> dict[str, dict[str, Times]]:
    """Seconds of every micro-batch of every step, by the contestant's name, as this rank saw them.

    Returns:
        `measured`, and `machine`: the same without sleeps and wire, which is this machine's own cost of running so many ranks;
        both divided by the slow motion.
    """
    mesh = ParallelMesh(Degrees(runtime.world_size), runtime.rank)
    executor = Executor(mesh, lambda comm: SequenceParallel(comm, exchange))
    ranks = _Ranks(executor, shape, links)
    for job in jobs:
        for plan in job.plans:
            executor.prepare(plan)
            for batch in plan.micro_batches:  # connections are made by the first message
                ranks.run(batch, None)
    # Contestants take turns, step by step, so that whatever else the machine does hits all alike.
    found: dict[str, dict[str, Times]] = {job.name: {"measured": [], "machine": []} for job in jobs}
    for step in range(len(jobs[0].plans)):
        for kind in ("machine", "measured"):
            for job in jobs:
                times = []
                for batch, seconds in zip(job.plans[step].micro_batches, job.seconds[step], strict=True):
                    runtime.barrier()
                    start = time.perf_counter()
                    ranks.run(batch, seconds if kind == "measured" else None)
                    runtime.barrier()
                    times.append((time.perf_counter() - start) / links.slow)
                found[job.name][kind].append(times)
                if tell and runtime.is_main and kind == "measured":
                    print(f"step {step + 1} of {len(job.plans)}, {job.name}: {sum(times) * links.slow:.0f} s", file=sys.stderr)
    return found


class _Ranks:
    """Micro-batches on this rank; without seconds nothing is slept, and the wire is this machine's."""

    def __init__(self, executor: Executor, shape: Shape, links: Links) -> None:
        self.executor, self.shape, self.links = executor, shape, links

    def run(self, batch: MicroBatch, seconds: Sequence[dict[str, float]] | None) -> None:
        place, shape, slow = self.executor.mesh.data_rank, self.shape, self.links.slow
        for index, group in enumerate(batch.groups):
            if place not in group.ranks:
                continue
            engine = self.executor.engine(group.ranks)
            assert engine is not None
            times = dict.fromkeys((*shape.layers, HEAD), 0.0) if seconds is None else seconds[index]
            held = group.cuts[place - group.ranks.start + 1] - group.cuts[place - group.ranks.start]
            for reverse in (False, True):
                share = slow * (1 - FORWARD if reverse else FORWARD)
                for letter in reversed(shape.layers) if reverse else shape.layers:
                    time.sleep(share * times[letter])
                    thin = THIN if letter == "N" else 1
                    engine.comm.wire = None if seconds is None else self.links.wire(engine.comm.size, thin)
                    (_tokens if letter == "N" else _states)(engine, group.tokens, held, shape, reverse)
                time.sleep(share * times[HEAD])


def _tokens(engine: SequenceParallel, tokens: int, held: int, shape: Shape, reverse: bool) -> None:
    """All-to-all of queries, keys and values to heads, and of outputs back, as `ulysses` sends them; or of their gradients.

    One in `THIN` bytes: all of them, through the memory of one machine, would cost its cores what network cards do elsewhere.
    """
    comm = engine.comm
    for width in (3 * shape.width, shape.width):
        block = max(1, held * width // comm.size // THIN)
        comm.all_to_all([torch.zeros(block) for _ in range(comm.size)], [(block,)] * comm.size, "tokens").wait()


def _states(engine: SequenceParallel, tokens: int, held: int, shape: Shape, reverse: bool) -> None:
    """The exchange of states, forward or reverse; nothing is computed beside it."""
    if engine.comm.size == 1:
        return
    state = torch.zeros(1, shape.heads, shape.width // shape.heads, shape.width // shape.heads)
    chain = SequenceLayout.contiguous(tokens, engine.comm.size).chain(Documents((0, tokens)))
    maps = AffineMap(state, Constant(torch.zeros(shape.heads), [held]))
    engine.exchange.start(maps.adjoint(state) if reverse else maps, chain, None, reverse).wait()
