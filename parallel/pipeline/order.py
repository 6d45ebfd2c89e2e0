"""In which order a process of a pipeline runs its stages, read off torch's schedules, and the halves of a backward.

Letters: p processes of a pipeline, S stages.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input
from torch.distributed.pipelining.schedules import get_schedule_class

from .stages import SCHEDULES, owners

FORWARD, BACKWARD, INPUT, WEIGHT = "F", "B", "I", "W"


class Action(NamedTuple):
    """A forward of one micro-batch, its backward, or the two halves of one: the input's gradient, then the weights'."""

    kind: str
    stage: int


def order(schedule: str, processes: int, stages_per_rank: int, micro_batches: int, rank: int) -> list[Action]:
    """What process `rank` does in a step.

    Args:
        schedule: by name (`SCHEDULES`); checked already.
    """
    kind, count = SCHEDULES[schedule], processes * stages_per_rank
    own = [stage for stage, owner in enumerate(owners(count, processes, kind.folded)) if owner == rank]
    stages: list[Any] = [
        SimpleNamespace(
            stage_index=stage,
            num_stages=count,
            group_size=processes,
            group_rank=rank,
            is_first=stage == 0,
            is_last=stage == count - 1,
            submod=nn.Identity(),
            device=torch.device("cpu"),
        )
        for stage in own
    ]
    made: Any = get_schedule_class(kind.name)(
        stages if kind.several else stages[0], micro_batches, loss_fn=lambda output, target: output, scale_grads=False
    )
    found: list[Action] = []
    for action in made.pipeline_order[rank]:
        for part in () if action is None else action.sub_actions or (action,):
            name = part.computation_type.value
            if name in (FORWARD, BACKWARD, INPUT, WEIGHT):
                found.append(Action(name, part.stage_index))
    return found


def backward_of_input(
    outputs: list[Tensor], gradients: list[Tensor] | None, entering: list[Tensor], weights: Iterable[Any]
) -> Any:
    """The first half of a backward, as a stage runs it; what is returned holds what the second half needs."""
    return stage_backward_input(outputs, gradients, entering, iter(weights))
