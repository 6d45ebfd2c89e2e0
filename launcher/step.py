"""One optimizer step and one evaluation: the loss of law 5.

loss = sum over valid tokens / global count of valid tokens, over data x sequence x micro-batches. The count is known
before the first forward, so every process scales its own sum by it and gradients are only ever added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from longhaul.models.ops.segments import Documents
from longhaul.models.streaming import LongStream, Streaming, check_streamable
from longhaul.parallel.data import DataParallel
from longhaul.parallel.engine import SequenceParallel
from longhaul.parallel.runtime import Runtime

from .batches import place
from .data import Stream, ValidationStreams
from .memory import giving_back
from .optimizer import set_learning_rate


@dataclass(frozen=True)
class StepResult:
    """What a step says of itself, the same on every process."""

    loss: float
    """Nats per valid token over the whole step; 0 if no token was valid."""
    gradient_norm: float
    """Before clipping."""
    weight: float
    """Valid tokens of the step."""
    stop_signal: int
    """The signal that asks any process to stop, 0 if none does."""
    extra: Mapping[str, float] = field(default_factory=dict)
    """Other metrics by key."""

    def saying(self, extra: Mapping[str, float]) -> StepResult:
        """The same with more metrics."""
        return replace(self, extra={**self.extra, **extra})


class Stepper:
    """Runs a model on this process's part of the streams.

    Args:
        model: with gradients summed over processes.
        engine: how a stream is spread over the sequence group.
        runtime: this process.
        optimizer: of the model's parameters.
        clip: largest gradient norm; 0 never scales.
        precision: `fp32` or `bf16`.
        carry_state: a stream's first document goes on from the state the stream before ended with.
        stream_tokens: run each stream in chunks of so many tokens, keeping only the states at their borders; whole if None.
        stream_truncated: states between chunks carry no gradients.
        stop_signal: asked at every boundary.
    """

    at_once = 1
    """Held-out streams that a data-parallel group judges between two questions for signals."""

    def __init__(
        self,
        model: DataParallel,
        engine: SequenceParallel,
        runtime: Runtime,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float = 0.0,
        precision: str = "fp32",
        carry_state: bool = False,
        stream_tokens: int | None = None,
        stream_truncated: bool = False,
        stop_signal: Callable[[], int] = lambda: 0,
    ) -> None:
        self.model, self.engine, self.runtime, self.optimizer = model, engine, runtime, optimizer
        self.clip, self.bf16, self.carry_state, self.stop_signal = clip, precision == "bf16", carry_state, stop_signal
        self.state: Any = None
        """Carried from the stream before; detached: gradients end at a stream's start."""
        self.run_chunk = giving_back(self._run)
        self.streaming: Streaming | None = None
        if stream_tokens is not None:
            check_streamable(model.model)
            self.streaming = Streaming(
                self.run_chunk,
                stream_tokens,
                lambda documents, keep_state: engine.shard(documents, runtime.device, keep_state),
                keep="cpu",  # flat memory on a GPU, for a copy of one state a chunk
                truncate=stream_truncated,
                accumulate=model.accumulate,
                alike=model.counts_outputs,
            )

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """The model in the run's precision."""
        with torch.autocast(self.runtime.device.type, torch.bfloat16, enabled=self.bf16):
            return self.model(*args, **kwargs)

    def train(self, streams: Sequence[Stream], rate: float) -> StepResult:
        """One optimizer step on the streams of this process's data-parallel group, one after another."""
        device = self.runtime.device
        weight = self.model.sum_over_streams(sum(float(stream.weights.sum()) for stream in streams), device)
        scale = 1.0 / max(weight, 1.0)
        loss = torch.zeros((), dtype=torch.float64, device=device)
        for index, stream in enumerate(streams):
            last = index == len(streams) - 1
            if self.streaming is not None:
                streamed = self.streaming.backward(
                    _long(stream), self.state, scale=scale, keep_state=self.carry_state, last=last
                )
                loss += streamed.loss_sum
                self.state = streamed.state
                continue
            batch = place(stream, self.engine, device, self.carry_state)
            with self.model.accumulate(last=last):
                output = self._run(batch.tokens, batch.shard, self.state, labels=batch.labels, weights=batch.weights)
                (output.loss_sum * scale).backward()
            loss += output.loss_sum.detach()
            if output.aux_sum is not None:
                loss -= output.aux_sum  # what is reported is the language model's loss alone
            if self.carry_state:
                self.state = tree_map_only(torch.Tensor, torch.Tensor.detach, output.state)
        return self._finish(loss, scale, weight, rate)

    def _finish(self, loss: torch.Tensor, scale: float, weight: float, rate: float) -> StepResult:
        """From accumulated gradients to new weights; `loss` is the sum over this process's tokens."""
        self.model.finish_gradients()
        set_learning_rate(self.optimizer, rate)
        norm = self.model.step(self.optimizer, self.clip)
        self.model.after_step()
        total = self.runtime.sum([loss.item()])[0]
        signal = self.runtime.maximum(self.stop_signal())
        return StepResult(total * scale, norm.item(), weight, signal)

    @torch.no_grad()
    def evaluate(self, streams: ValidationStreams, data_rank: int, data_size: int) -> tuple[float, float, int]:
        """The loss over held-out streams.

        Returns:
            Nats per valid token, valid tokens, and the signal that cut the evaluation short (0: none did).
        """
        totals = [0.0, 0.0]
        self.model.model.eval()
        signal, together = 0, self.at_once * data_size
        for first in range(0, len(streams), together):
            found = self._judge(streams, range(first, min(first + together, len(streams))), data_rank, data_size)
            totals = [total + value for total, value in zip(totals, found)]
            signal = self.runtime.maximum(self.stop_signal())
            if signal:
                break
        self.model.model.train()
        loss, weight = self.runtime.sum(totals)
        return loss / max(weight, 1.0), weight, signal

    def _judge(self, streams: ValidationStreams, numbers: range, data_rank: int, data_size: int) -> tuple[float, float]:
        """Sums of loss and weight over the tokens held here of some held-out streams, `at_once` for each group or fewer."""
        loss = weight = 0.0
        longest = streams[numbers.start].tokens.shape[0]  # only the last stream of all is shorter
        for stream, counts in own_share(streams, numbers, data_rank, data_size):
            if self.streaming is not None:
                whole = _long(stream)
                output: Any = self.streaming.evaluate(whole._replace(weights=whole.weights * counts), like=longest)
            else:
                batch = place(stream, self.engine, self.runtime.device)
                output = self._run(batch.tokens, batch.shard, None, labels=batch.labels, weights=batch.weights * counts)
            loss, weight = loss + float(output.loss_sum), weight + float(output.weight_sum)
        return loss, weight


def own_share(
    streams: ValidationStreams, numbers: range, data_rank: int, data_size: int
) -> Iterator[tuple[Stream, float]]:
    """The streams of these that a data-parallel group runs, each with what its weights count.

    Every process takes part in every forward: one without a stream left runs the last one at weight zero.
    """
    for index in range(numbers.start + data_rank, numbers.stop + data_rank, data_size):
        yield streams[min(index, len(streams) - 1)], float(index < len(streams))


def _long(stream: Stream) -> LongStream:
    return LongStream(stream.tokens, stream.labels, stream.weights, Documents(stream.bounds, stream.first_position))
