"""What `bench planner` runs on ranks: planned steps whose computing is slept, and whose communication is real.

Legend: n tokens of a rank, P ranks of a group, D model width.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from longhaul.models.ops.affine import AffineMap, Constant
from longhaul.models.ops.segments import Documents
from longhaul.parallel.comm import Comm, Wire
from longhaul.parallel.engine import SequenceParallel
from longhaul.parallel.executor import Executor
from longhaul.parallel.layout import SequenceLayout
from longhaul.parallel.mesh import Degrees, ParallelMesh
from longhaul.parallel.planner import MicroBatch, Plan
from longhaul.parallel.runtime import Runtime

FORWARD = 1 / 3  # of a layer's time; the rest is its backward
HEAD = "head"


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

    def wire(self, ranks: int) -> Wire:
        return Wire(self.delay * self.slow, (self.inside if ranks <= self.node else self.across) / self.slow)


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


def measure(runtime: Runtime, shape: Shape, links: Links, exchange: str, jobs: Sequence[Job]) -> dict[str, Any]:
    """Seconds of every micro-batch of every step, by the contestant's name, as this rank saw them."""
    mesh = ParallelMesh(Degrees(runtime.world_size), runtime.rank)

    def engine(comm: Comm) -> SequenceParallel:
        comm.wire = links.wire(comm.size)
        return SequenceParallel(comm, exchange)

    executor = Executor(mesh, engine)
    for job in jobs:
        for plan in job.plans:
            executor.prepare(plan)
            for batch in plan.micro_batches:  # connections are made by the first message
                _run(executor, batch, [dict.fromkeys((*shape.layers, HEAD), 0.0)] * len(batch.groups), shape)
    # Contestants take turns, step by step, so that whatever else the machine does hits all alike.
    found: dict[str, list[list[float]]] = {job.name: [] for job in jobs}
    for step in range(len(jobs[0].plans)):
        for job in jobs:
            times = []
            for batch, seconds in zip(job.plans[step].micro_batches, job.seconds[step], strict=True):
                runtime.barrier()
                start = time.perf_counter()
                _run(executor, batch, seconds, shape, links.slow)
                runtime.barrier()
                times.append((time.perf_counter() - start) / links.slow)
            found[job.name].append(times)
    return found


def _run(
    executor: Executor, batch: MicroBatch, seconds: Sequence[dict[str, float]], shape: Shape, slow: float = 1.0
) -> None:
    """One micro-batch on this rank."""
    place = executor.mesh.data_rank
    for group, times in zip(batch.groups, seconds, strict=True):
        if place in group.ranks:
            engine = executor.engine(group.ranks)
            assert engine is not None
            tokens = group.tokens
            held = group.cuts[place - group.ranks.start + 1] - group.cuts[place - group.ranks.start]
            for reverse in (False, True):
                share = slow * (1 - FORWARD if reverse else FORWARD)
                for letter in reversed(shape.layers) if reverse else shape.layers:
                    time.sleep(share * times[letter])
                    (_tokens if letter == "N" else _states)(engine, tokens, held, shape, reverse)
                time.sleep(share * times[HEAD])


def _tokens(engine: SequenceParallel, tokens: int, held: int, shape: Shape, reverse: bool) -> None:
    """All-to-all of queries, keys and values to heads, and of outputs back, as `ulysses` sends them; or of their gradients."""
    comm = engine.comm
    for width in (3 * shape.width, shape.width):
        block = max(1, held * width // comm.size)
        comm.all_to_all([torch.zeros(block) for _ in range(comm.size)], [(block,)] * comm.size, "tokens").wait()


def _states(engine: SequenceParallel, tokens: int, held: int, shape: Shape, reverse: bool) -> None:
    """The exchange of states, forward or reverse; nothing is computed beside it."""
    if engine.comm.size == 1:
        return
    state = torch.zeros(1, shape.heads, shape.width // shape.heads, shape.width // shape.heads)
    chain = SequenceLayout.contiguous(tokens, engine.comm.size).chain(Documents((0, tokens)))
    maps = AffineMap(state, Constant(torch.zeros(shape.heads), [held]))
    engine.exchange.start(maps.adjoint(state) if reverse else maps, chain, None, reverse).wait()
