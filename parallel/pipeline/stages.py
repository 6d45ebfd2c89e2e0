"""Which layers are where, in integers only: a model cut in stages, stages given to the processes of a pipeline.

Letters: p processes of a pipeline, S stages, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from longhaul.models.errors import UserError


class Kind(NamedTuple):
    """A schedule of torch: its name there, and how stages lie."""

    name: str
    several: bool = True
    """A process may hold several stages."""
    folded: bool = False
    """Two stages a process, there and back: 0 .. p - 1, p - 1 .. 0. Else stage s is on process s mod p."""


SCHEDULES = {
    "gpipe": Kind("GPipe", several=False),
    "1f1b": Kind("1F1B", several=False),
    "interleaved_1f1b": Kind("Interleaved1F1B"),
    "looped_bfs": Kind("LoopedBFS"),
    "interleaved_zero_bubble": Kind("InterleavedZeroBubble"),
    "zbv_zero_bubble": Kind("ZBVZeroBubble", folded=True),
    "dualpipev": Kind("DualPipeV", folded=True),
}


def check_schedule(schedule: str, processes: int, stages_per_rank: int | None, micro_batches: int) -> int:
    """Stages of each process, two if several are possible and none are given.

    Raises:
        UserError: the schedule does not exist, or does not fit.
    """
    kind = SCHEDULES.get(schedule)
    if kind is None:
        raise UserError(f"parallel.pipeline_schedule {schedule!r} is none of {', '.join(SCHEDULES)}.")
    each = (2 if kind.several else 1) if stages_per_rank is None else stages_per_rank
    if each < 1 or (each > 1 and not kind.several):
        raise UserError(
            f"parallel.pipeline_stages_per_rank is {each}, but pipeline_schedule {schedule} has one stage a process: leave it "
            "out, or use interleaved_1f1b."
        )
    if kind.folded and each != 2:
        raise UserError(
            f"parallel.pipeline_stages_per_rank is {each}, but pipeline_schedule {schedule} has two stages a process: leave it "
            "out."
        )
    least = {"1f1b": processes, "dualpipev": 2 * processes}.get(schedule, 1)
    if micro_batches < least:
        raise UserError(
            f"pipeline_schedule {schedule} on {processes} processes needs {least} streams for each data-parallel group, but "
            f"train.global_batch_size gives {micro_batches}: raise it, or use pipeline_schedule gpipe."
        )
    rounds = max(1, micro_batches // processes)
    if schedule.startswith("interleaved") and micro_batches % rounds:
        raise UserError(
            f"pipeline_schedule {schedule} runs rounds of equal size, which {micro_batches} streams for each data-parallel "
            f"group do not make on {processes} processes: make train.global_batch_size give a multiple of {processes}."
        )
    return each


def split_by_cost(costs: Sequence[float], stages: int, last: float = 0.0) -> list[range]:
    """Runs of consecutive layers, at least one each, of which the dearest costs least; among these the most even.

    Args:
        costs: of each layer.
        stages: S, at most as many as there are layers.
        last: what the last stage costs besides its layers.
    """
    total = len(costs)
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)

    def cost_of(start: int, stop: int) -> float:
        return before[stop] - before[start] + (last if stop == total else 0.0)

    # best[n]: (largest cost, sum of squares, cuts) of the first n layers in so many stages.
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for stage in range(1, stages + 1):
        found: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for stop in [total] if stage == stages else range(stage, total - (stages - stage) + 1):
            found[stop] = min(
                (max(largest, cost_of(start, stop)), squares + cost_of(start, stop) ** 2, (*cuts, stop))
                for start, (largest, squares, cuts) in best.items()
                if start < stop
            )
        best = found
    cuts = (0, *best[total][2])
    return [range(start, stop) for start, stop in zip(cuts, cuts[1:])]


def split_by_hand(layers_of_stages: Sequence[int], stages: int, layers: int) -> list[range]:
    """Runs of so many layers each.

    Raises:
        UserError: they are not the model's.
    """
    if len(layers_of_stages) != stages or min(layers_of_stages) < 1 or sum(layers_of_stages) != layers:
        raise UserError(
            f"parallel.pipeline_split {list(layers_of_stages)} must give each of {stages} stages a number of layers, at least 1, "
            f"{layers} together; leave it out to cut by cost."
        )
    starts = [sum(layers_of_stages[:stage]) for stage in range(stages)]
    return [range(start, start + count) for start, count in zip(starts, layers_of_stages)]


def owners(stages: int, processes: int, folded: bool) -> list[int]:
    """The process of each stage."""
    if folded:
        return [*range(processes), *reversed(range(processes))]
    return [stage % processes for stage in range(stages)]
