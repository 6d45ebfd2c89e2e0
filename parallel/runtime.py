"""The life of a process in a job: joining, agreeing, leaving. Everything it needs to know is an argument."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from longhaul.models.errors import UserError

from .comm import Comm, Ledger

R = TypeVar("R")


class Runtime:
    """This process among the others.

    One process alone needs no group, no port and no environment: every collective here then returns at once.

    Args:
        rank: of this process.
        world_size: number of processes.
        local_rank: of this process on its machine; names its GPU.
        init_method: how processes find each other, a URL that torch.distributed knows (`env://`, `tcp://`, `file://`).
        device: "cpu", "cuda" or "auto" (cuda where there is a GPU).
        timeout: seconds to wait for another process before failing.
        local_world_size: processes on this machine; all of them if left out.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        local_rank: int = 0,
        init_method: str = "env://",
        device: str = "auto",
        timeout: float = 300.0,
        local_world_size: int | None = None,
    ) -> None:
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self.local_world_size = local_world_size or world_size
        self.timeout = timedelta(seconds=timeout)
        self.device = _device(device, local_rank)
        self._owns_group = False
        if world_size > 1 and not dist.is_initialized():
            dist.init_process_group(
                # States are saved from the CPU in the background, so a CUDA job has a CPU backend too.
                "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
                init_method=init_method,
                rank=rank,
                world_size=world_size,
                timeout=self.timeout,
                device_id=self.device if self.device.type == "cuda" else None,
            )
            self._owns_group = True

    @property
    def is_main(self) -> bool:
        """The process that speaks and writes."""
        return self.rank == 0

    def comm(self, ledger: Ledger | None = None) -> Comm:
        """Collectives over all processes."""
        return Comm(dist.group.WORLD if self.world_size > 1 else None, ledger)

    def sum(self, values: list[float]) -> list[float]:
        """Numbers added over all processes, in float64."""
        if self.world_size == 1:
            return values
        return self._reduce(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.SUM).tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any process: what they all act on, so that none waits for another in vain."""
        return self.maximum(int(flag)) > 0

    def maximum(self, value: int) -> int:
        """The largest number of any process."""
        if self.world_size == 1:
            return value
        return int(self._reduce(torch.tensor(value, dtype=torch.int64), dist.ReduceOp.MAX).item())

    def _reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        x = x.to(self.device)
        dist.all_reduce(x, op=op)
        return x.cpu()

    def barrier(self) -> None:
        """Wait for all processes."""
        self.maximum(0)

    def on_main(self, work: Callable[[], R]) -> R:
        """What `work` returns on the main process, on every process; its `UserError` is raised on every process."""
        if self.world_size == 1:
            return work()
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer[0] = work()
            except UserError as error:
                answer[1] = error
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise answer[1]
        result: R = answer[0]
        return result

    def agree_on_error(self, error: UserError | None) -> None:
        """Raise on every process if there is an error on any: the same sentence, that of the lowest rank.

        A mistake that one process sees (a file missing on one machine) must not leave the others waiting.
        """
        if self.world_size == 1:
            if error is not None:
                raise error
            return
        if not self.any(error is not None):
            return
        messages: list[str | None] = [None] * self.world_size
        dist.all_gather_object(messages, None if error is None else str(error))
        raise UserError(next(message for message in messages if message is not None))

    def close(self) -> None:
        """Leave the group, if this object joined it."""
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()
            self._owns_group = False


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("train.device is cuda, but torch sees no GPU here: give cpu or auto.")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"Process {local_rank} of this machine has no GPU of its own: it has {torch.cuda.device_count()}; start as "
            "many processes per machine, or set train.device to cpu."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
