"""Collectives whose buffers belong to a thread of their own, for counting what the others' thread allocates.

gloo's threads let go of a tensor a moment after the caller does, or a moment before: whose release it is, and so whether it
is recorded, is chance. Here gloo gets copies that the recorder never saw, and the caller gets a tensor of its own back. So what
goes into a collective and what comes out of it is counted, and not what it holds inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from longhaul.parallel.comm import Comm, Handle


class Apart(Comm):
    """The collectives of `comm`, made by another thread: those that a training step of an encoder needs."""

    def __init__(self, comm: Comm) -> None:
        super().__init__(comm.group, comm.ledger)
        self._thread = ThreadPoolExecutor(1)

    def _there(self, work: Callable[[], Any]) -> Any:
        return self._thread.submit(torch.no_grad()(work)).result()

    def _collective(self, post: Callable[..., Handle], x: Tensor, label: str) -> Handle:
        if self.size == 1:
            return post(x, label)
        handle = self._there(lambda: post(x.clone(), label))
        return Handle((), lambda: self._there(handle.wait).clone(), lambda: None)

    def all_gather(self, x: Tensor, label: str) -> Handle:
        return self._collective(super().all_gather, x, label)

    def reduce_scatter(self, x: Tensor, label: str) -> Handle:
        return self._collective(super().reduce_scatter, x, label)

    def all_reduce(self, x: Tensor, label: str, op: Any = None) -> Handle:
        assert op is None
        return self._collective(super().all_reduce, x, label)

    def exchange(
        self, send: Sequence[tuple[int, Tensor]], receive: Sequence[tuple[int, Tensor]], label: str, tag: int = 0
    ) -> Handle:
        post = super().exchange
        buffers = [buffer for _, buffer in receive]

        def posted() -> Handle:
            copies = [(peer, x.clone()) for peer, x in send]
            return post(copies, [(peer, torch.empty_like(buffer)) for peer, buffer in receive], label, tag)

        def arrived() -> list[Tensor]:
            for buffer, found in zip(buffers, self._there(handle.wait)):
                buffer.copy_(found)
            return buffers

        handle = self._there(posted)
        return Handle((), arrived, lambda: None)
