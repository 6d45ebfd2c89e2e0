"""A planned training step: unequal micro-batches in changing groups, one loss.

Every process holds the whole global batch and the same plan, so it knows the step's weight before the first forward, and which
tokens of which micro-batch are its own. Without the plan the same documents give the same sums, up to rounding.

Letters: `T` tokens held here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from longhaul.launcher.data import Stream, ValidationStreams
from longhaul.launcher.step import Stepper, StepResult
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import SequenceShard
from longhaul.models.streaming import LongStream, Streaming
from longhaul.parallel.executor import Executor, Placed

from .ahead import Piece, Step, StepPlanner


class PlannedStepper(Stepper):
    """Runs a model on this process's part of planned steps; arguments beside these as `Stepper` takes them.

    Args:
        planner: which step comes, and its plan.
        executor: groups and shards of plans.
        stream_tokens: documents that no group holds run in chunks of so many tokens, on the largest block.
    """

    def __init__(
        self, *args: Any, planner: StepPlanner, executor: Executor, stream_tokens: int | None = None, **options: Any
    ) -> None:
        super().__init__(*args, stream_tokens=stream_tokens, **options)
        self.planner, self.executor = planner, executor
        self.clock: Callable[[torch.device], Stopwatch] = Stopwatch
        self.equal_work: Callable[[], float] = EqualWork(self.runtime.device)
        self.step: Step | None = None
        if stream_tokens is not None:
            self.streaming = Streaming(self.run_chunk, stream_tokens, self._chunk, keep="cpu", accumulate=self.model.accumulate)

    def read(self, consumed: int) -> Sequence[Stream]:
        """The global batch that begins with sample `consumed`; what `train` is given next."""
        self.step = self.planner.take(consumed)
        return self.step.streams

    def train(self, streams: Sequence[Stream], rate: float) -> StepResult:
        """One optimizer step on the streams read last, as planned."""
        step = self.step
        assert step is not None and step.streams is streams, "the planner reads what is trained on"
        device, scale = self.runtime.device, 1.0 / max(step.weight, 1.0)
        loss = torch.zeros((), dtype=torch.float64, device=device)
        batches = self._prepare(step)
        watch = self.clock(device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1 and not step.long
            placed = self.executor.place(batch, step.lengths, step.positions)
            if not placed.idle or last or self.model.lockstep:
                with self.model.accumulate(last=last):
                    output = self._forward(step, placed)
                    (output.loss_sum * scale).backward()
                loss += output.loss_sum.detach()
                if output.aux_sum is not None:
                    loss -= output.aux_sum  # what is reported is the language model's loss alone
            watch.lap()
        for index, piece in enumerate(step.long):
            assert self.streaming is not None, "lengths were checked"
            last = index == len(step.long) - 1
            loss += self.streaming.backward(self._whole(step, piece), scale=scale, last=last).loss_sum
        result = self._finish(loss, scale, step.weight, rate)
        return result.saying(self._account(step, watch))

    def _judge(self, streams: ValidationStreams, numbers: range, data_rank: int, data_size: int) -> tuple[float, float]:
        """Held-out streams are planned too, as many at a time as there are places."""
        step = self.planner.make([streams[index] for index in numbers])
        outputs = []
        for batch in self._prepare(step):
            placed = self.executor.place(batch, step.lengths, step.positions)
            if not placed.idle or self.model.lockstep:
                outputs.append(self._forward(step, placed))
        if self.streaming is not None:
            outputs += [self.streaming.evaluate(self._whole(step, piece)) for piece in step.long]
        return sum(float(output.loss_sum) for output in outputs), sum(float(output.weight_sum) for output in outputs)

    def _prepare(self, step: Step) -> Sequence[Any]:
        """The step's micro-batches, their groups made."""
        if step.long:
            self.executor.engine(self.executor.largest)
        if step.plan is None:
            return ()
        self.executor.agree(step.plan, step.lengths)
        self.executor.prepare(step.plan)
        return step.plan.micro_batches

    def _forward(self, step: Step, placed: Placed) -> Any:
        tokens, labels, weights = (values.to(self.runtime.device) for values in held(step, placed))
        return self._run(tokens, placed.shard, labels=labels, weights=weights)

    def _chunk(self, documents: Documents, keep_state: bool) -> SequenceShard:
        """This rank's part of a chunk of a streamed document: none outside of the largest block."""
        engine = self.executor.engine(self.executor.largest)
        if engine is None:
            return self.executor.empty(documents, keep_state)
        return engine.shard(documents, self.runtime.device, keep_state)

    def _whole(self, step: Step, piece: Piece) -> LongStream:
        values = (value[piece.start : piece.stop] for value in _values(step.streams[piece.stream]))
        tokens, labels, weights = values
        # Its state starts anew here, so its positions do: what a chunk is handed belongs to the chunks before it.
        return LongStream(tokens, labels, weights, Documents((0, piece.length)))

    def _account(self, step: Step, watch: Stopwatch) -> dict[str, float]:
        """Learn from the step's times, and say how it went beside the plan."""
        if step.plan is None:
            return {}
        seconds = self.executor.slowest(watch.seconds())
        if self.planner.config.learn:
            self.planner.learn(step, seconds, self.executor.times_of_places(self.equal_work()))
        predicted, measured = step.plan.time, sum(seconds)
        return {
            "planner/micro_batches": len(step.plan.micro_batches),
            "planner/predicted(s)": predicted,
            "planner/measured(s)": measured,
            "planner/prediction_error(%)": 100 * abs(predicted - measured) / max(measured, 1e-9),
            "planner/idle(%)": 100 * step.plan.idle,
            "planner/gap_to_bound(%)": 100 * step.plan.gap,
            "planner/planning(s)": step.seconds,
            "planner/slowest_rank": min(self.planner.learner.cluster.speeds, default=1.0),
        }


def _values(stream: Stream) -> tuple[Tensor, Tensor, Tensor]:
    return stream.tokens, stream.labels, stream.weights


def held(step: Step, placed: Placed) -> list[Tensor]:
    """Tokens, labels and weights [T] of a micro-batch held here, cut from the step's streams."""
    rows: list[tuple[Stream, int, int]] = []
    for start, stop in placed.ranges:
        for index, (first, end) in zip(placed.documents, pairwise(placed.shard.documents.bounds), strict=True):
            low, high = max(first, start), min(end, stop)
            if low < high:
                piece = step.pieces[index]
                rows.append((step.streams[piece.stream], piece.start + low - first, piece.start + high - first))
    none = [values[:0] for values in _values(step.streams[0])]
    parts = [[values[low:high] for values in _values(stream)] for stream, low, high in rows]
    return [torch.cat([empty, *columns]) for empty, *columns in zip(none, *parts)]


class Stopwatch:
    """Times of work done one after the other, on a GPU without making it wait."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []
        self.lap()

    def lap(self) -> None:
        """The work so far ends here."""
        if self._cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
            self._marks.append(mark)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """From each mark to the next; waits for the last."""
        if self._cuda:
            self._marks[-1].synchronize()
            return [1e-3 * before.elapsed_time(after) for before, after in pairwise(self._marks)]
        return [after - before for before, after in pairwise(self._marks)]


class EqualWork:
    """Seconds of the same small product on every process, the least of some tries: how fast each is beside the others."""

    TRIES = 3

    def __init__(self, device: torch.device) -> None:
        self._device = device
        size = 4096 if device.type == "cuda" else 192
        self._matrix = torch.ones(size, size, dtype=torch.float32, device=device)

    def __call__(self) -> float:
        watch = Stopwatch(self._device)
        for _ in range(self.TRIES):
            torch.mm(self._matrix, self._matrix)
            watch.lap()
        return max(min(watch.seconds()), 1e-9)
