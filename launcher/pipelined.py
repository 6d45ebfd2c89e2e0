"""Steps and evaluations of a model whose layers are divided over the processes of a pipeline."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from longhaul.models.errors import UserError
from longhaul.parallel.pipeline.layers import PipelineParallel
from longhaul.parallel.pipeline.schedule import Schedule
from longhaul.parallel.pipeline.stages import check_schedule

from .batches import place
from .data import Stream, ValidationStreams
from .step import Stepper, StepResult, own_share

if TYPE_CHECKING:
    from .config import TrainConfig


def stages_per_rank(config: TrainConfig) -> int:
    """Stages of each process of a pipeline.

    Raises:
        UserError: something the run asks for cannot go with pipeline stages.
    """
    parallel = config.parallel
    size = parallel.pipeline_parallel_size
    if size == 1:
        return 1
    what = f"parallel.pipeline_parallel_size {size}"
    refused = {
        "data.carry_state": (
            config.data.carry_state,
            "a stream goes on from the state the one before ended with, but a pipeline starts it earlier",
        ),
        "train.stream_tokens": (
            config.train.stream_tokens is not None,
            "its backward replays all layers of a chunk, which no process of a pipeline holds",
        ),
        "parallel.planner": (parallel.planner.enabled, "a schedule wants equal micro-batches on one sequence group"),
    }
    for name, (asked, reason) in refused.items():
        if asked:
            raise UserError(f"{name} cannot go with {what}: {reason}; leave one of the two out.")
    return check_schedule(
        parallel.pipeline_schedule, size, parallel.pipeline_stages_per_rank, config.streams_per_group
    )


class PipelinedStepper(Stepper):
    """Runs a step's streams through a pipeline, one micro-batch each.

    Args:
        pipeline: the stages of this process.
        micro_batches: streams of a step for each data-parallel group.
        arguments, options: of `Stepper`.
    """

    def __init__(self, pipeline: PipelineParallel, micro_batches: int, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        device = self.runtime.device
        self.schedule = Schedule(pipeline, micro_batches, self._precision, self.model.dtype, device)
        self.at_once = pipeline.comm.size  # so many fill the pipeline

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.runtime.device.type, torch.bfloat16, enabled=self.bf16)

    def train(self, streams: Sequence[Stream], rate: float) -> StepResult:
        device = self.runtime.device
        weight = self.model.sum_over_streams(sum(float(stream.weights.sum()) for stream in streams), device)
        scale = 1.0 / max(weight, 1.0)
        batches = [place(stream, self.engine, device) for stream in streams]
        with self.model.whole_step():
            loss = self.schedule.train(batches, scale)
        return self._finish(loss, scale, weight, rate)

    def _judge(self, streams: ValidationStreams, numbers: range, data_rank: int, data_size: int) -> tuple[float, float]:
        batches = []
        for stream, counts in own_share(streams, numbers, data_rank, data_size):
            batch = place(stream, self.engine, self.runtime.device)
            batch.weights = batch.weights * counts
            batches.append(batch)
        return self.schedule.evaluate(batches)
