"""Micro-batches through the stages of a pipeline, by torch's schedules.

torch's schedules copy arguments that are no tensors, and size their buffers by the first micro-batch. So only two things go
through them: the index of a micro-batch, and one tensor between stages. All else is looked up here by the index, on the host, and
a buffer is made when its message is due, in the size its micro-batch asks for.

Letters: T' tokens this process answers for between layers, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from longhaul.models.lm import Between, LossOutput
from longhaul.models.sequence import SequenceShard

from .layers import PipelineParallel
from .stages import SCHEDULES


class MicroBatch(Protocol):
    """One stream's tokens held here, [T] each."""

    tokens: Tensor
    labels: Tensor
    weights: Tensor
    shard: SequenceShard


class Schedule:
    """Runs micro-batches through a pipeline.

    Args:
        pipeline: the stages of this process.
        micro_batches: of a step.
        precision: makes a context in which forwards run.
        dtype: of hidden states between layers.
        device: of this process.
    """

    def __init__(
        self,
        pipeline: PipelineParallel,
        micro_batches: int,
        precision: Callable[[], AbstractContextManager[Any]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.pipeline, self.comm, self.device = pipeline, pipeline.comm, device
        self.precision, self.dtype = precision, dtype
        self.batches: Sequence[MicroBatch] = ()
        self.scale = 1.0
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self._index = torch.arange(micro_batches)
        self._stages = [_Stage(_Part(self, stage), stage) for stage in pipeline.own]
        kind = SCHEDULES[pipeline.schedule]
        self._schedule: Any = get_schedule_class(kind.name)(
            self._stages if kind.several else self._stages[0],
            micro_batches,
            loss_fn=_given,
            scale_grads=False,
        )

    def train(self, batches: Sequence[MicroBatch], scale: float) -> Tensor:
        """Forward and backward of a step's micro-batches, their loss times `scale`.

        Returns:
            The sum of the language model's loss over the tokens held here, float64 []; 0 where the last stage is not.
        """
        self.batches, self.scale = batches, scale
        self.loss = torch.zeros_like(self.loss)
        self._schedule.step(micro_batch=self._index, target=self._index, return_outputs=False)
        self.batches = ()
        return self.loss

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> tuple[float, float]:
        """Sums of loss and weight over the tokens held here; 0 where the last stage is not.

        Each micro-batch goes through all stages; a process goes on with the next as soon as it has sent this one on.
        """
        sums = [0.0, 0.0]
        owners, sent = self.pipeline.owners, []
        for batch in batches:
            here: Tensor | None = None  # what a stage on this process gave the next one here
            for stage in self._stages:
                number = stage.stage_index
                entering = None
                if number and owners[number - 1] == self.comm.rank:
                    entering = here
                elif number:
                    buffer = self.empty(batch, number)
                    self.comm.exchange([], [(owners[number - 1], buffer)], "pipeline evaluation").wait()
                    entering = buffer
                out = stage.submod.run(batch, entering)
                if isinstance(out, LossOutput):
                    sums = [sums[0] + float(out.loss_sum), sums[1] + float(out.weight_sum)]
                    continue
                here = self.pack(batch, number + 1, out)
                if owners[number + 1] != self.comm.rank:
                    peer = owners[number + 1]
                    sent.append((here, self.comm.exchange([(peer, here)], [], "pipeline evaluation")))
        for _, handle in sent:
            handle.wait()
        return sums[0], sums[1]

    # What travels: x [T', D]; with pools, or if there is nothing, a vector of at least one number.

    def _shapes(self, batch: MicroBatch, stage: int) -> list[tuple[int, ...]]:
        return self.pipeline.model.between_shapes(batch.shard, self.pipeline.spans[stage].start)

    def empty(self, batch: MicroBatch, stage: int) -> Tensor:
        """A buffer for what enters a stage."""
        shapes = self._shapes(batch, stage)
        size = sum(torch.Size(shape).numel() for shape in shapes)
        dtype = self.dtype if len(shapes) == 1 else torch.promote_types(torch.float32, self.dtype)  # pools hold positions
        return torch.empty(shapes[0] if len(shapes) == 1 and size else (max(1, size),), dtype=dtype, device=self.device)

    def pack(self, batch: MicroBatch, stage: int, out: Between) -> Tensor:
        """What enters a stage, from what the one before it gave."""
        like = self.empty(batch, stage)
        if like.ndim == 2:
            return out.x.to(like.dtype)
        parts = [tensor.to(like.dtype).flatten() for tensor in (out.x, *out.memory)]
        flat = torch.cat(parts)
        return flat if flat.numel() else flat.sum()[None].clone()

    def unpack(self, batch: MicroBatch, stage: int, packed: Tensor) -> Between:
        """The inverse of `pack`."""
        if packed.ndim == 2:
            return Between(packed)
        shapes = self._shapes(batch, stage)
        sizes = [torch.Size(shape).numel() for shape in shapes]
        x, *memory = (part.view(shape) for part, shape in zip(packed[: sum(sizes)].split(sizes), shapes))
        return Between(x.to(self.dtype), tuple(memory))


class _Part(nn.Module):
    """One stage as torch runs it: a micro-batch's index and a tensor in, a tensor or the loss out."""

    def __init__(self, schedule: Schedule, stage: int) -> None:
        super().__init__()
        self.schedule, self.stage = schedule, stage
        self.model = schedule.pipeline.model

    def run(self, batch: MicroBatch, packed: Tensor | None) -> LossOutput | Between:
        schedule = self.schedule
        with schedule.precision():
            out: LossOutput | Between = self.model(
                batch.tokens,
                batch.shard,
                labels=batch.labels,
                weights=batch.weights,
                layers=schedule.pipeline.spans[self.stage],
                entering=None if packed is None else schedule.unpack(batch, self.stage, packed),
            )
        return out

    def forward(self, packed: Tensor | None = None, *, micro_batch: Tensor) -> Tensor:
        schedule = self.schedule
        batch = schedule.batches[int(micro_batch)]
        out = self.run(batch, packed)
        if isinstance(out, LossOutput):
            loss = out.loss_sum.detach()
            schedule.loss += loss if out.aux_sum is None else loss - out.aux_sum
            return out.loss_sum * schedule.scale
        if out.aux_sum is not None:
            out = out._replace(x=_WithLoss.apply(out.x, out.aux_sum, schedule.scale))
        return schedule.pack(batch, self.stage + 1, out)


class _WithLoss(torch.autograd.Function):
    """`x`, so that its backward also starts that of `scale * loss`: an auxiliary loss enters the objective where it is made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.dtype = scale, loss.dtype
        return x.clone()  # torch detaches a stage's output in place, which a view forbids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.full((), ctx.scale, dtype=ctx.dtype, device=grad.device), None


class _Stage(PipelineStage):
    """A stage whose buffers have the sizes of their micro-batches."""

    submod: _Part

    def __init__(self, part: _Part, stage: int) -> None:
        schedule = part.schedule
        count = len(schedule.pipeline.spans)
        # Shapes given beforehand keep torch from running the model to find them; these are placeholders.
        like = torch.empty(0, dtype=schedule.dtype, device=schedule.device, requires_grad=True)
        self._nothing = torch.empty(0, dtype=schedule.dtype, device=schedule.device)
        super().__init__(
            part,
            stage,
            count,
            schedule.device,
            input_args=(like,) if stage else (),
            output_args=(like,),
            group=schedule.comm.group,
        )

    def _buffer(self, micro_batch: int, stage: int, label: str) -> Tensor:
        schedule = self.submod.schedule
        buffer = schedule.empty(schedule.batches[micro_batch], stage)
        schedule.comm.ledger.add(label, "p2p", 1, buffer.numel() * buffer.element_size())
        return buffer

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        if self.stage_index:
            (info,) = self.args_recv_info[fwd_chunk_id]
            info.buffer = self._buffer(fwd_chunk_id, self.stage_index, "pipeline forward")
        return super().get_fwd_recv_ops(fwd_chunk_id)

    # torch keeps what was received until the next step; a stage keeps it for as long as its own graph does.

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        self._forget(self.args_recv_info[fwd_chunk_id])
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        self._forget(self.grad_recv_info[bwd_chunk_id])

    def _forget(self, received: Sequence[Any]) -> None:
        for info in received:
            info.buffer = self._nothing

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if not self.is_last:
            (info,) = self.grad_recv_info[bwd_chunk_id]
            info.buffer = self._buffer(bwd_chunk_id, self.stage_index + 1, "pipeline backward")
        return super().get_bwd_recv_ops(bwd_chunk_id)


def _given(output: Tensor, target: Tensor) -> Tensor:
    """The last stage gives its loss itself."""
    return output
