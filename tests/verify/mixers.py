"""A user's own mixers, as `--module` takes them: one that is right, one that never looks at the other ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from longhaul.models.ops.scalar_decay import ScalarDecay
from longhaul.models.sequence import SequenceShard, WholeSequence


class Decay(nn.Module):
    """Linear attention of two heads, each with a learned constant gate."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.gate = nn.Parameter(torch.zeros(2))

    def remember(self) -> None:
        """A time constant of some hundred tokens."""
        self.gate.data.fill_(-6.0)

    def forward(self, x: Tensor, shard: SequenceShard, state: Tensor | None = None) -> tuple[Tensor, Any]:
        q, k, v = (part.unflatten(1, (2, -1)) for part in self.qkv(x).chunk(3, dim=-1))  # [T, 2, D / 2] each
        log_decay = -self.gate.exp().expand(x.shape[0], 2)
        out, state = shard.scan(ScalarDecay(chunk=8), (q, k, v, log_decay), state)
        return out.flatten(1), state


class Alone(Decay):
    """The same, but as if this rank's tokens were the whole of every document."""

    def forward(self, x: Tensor, shard: SequenceShard, state: Tensor | None = None) -> tuple[Tensor, Any]:
        bounds = shard.segments.bounds
        own = WholeSequence(type(shard.documents)(bounds), keep_state=shard.keep_state)
        y, state = super().forward(x, own, None)
        shard.scan(ScalarDecay(chunk=8), (x[:, None], x[:, None], x[:, None], None), None)  # what it needs is seen from this
        return y, state


class Broken(Decay):
    """It fails where a rank does not hold the beginning of the stream; the first rank waits for it in vain."""

    def forward(self, x: Tensor, shard: SequenceShard, state: Tensor | None = None) -> tuple[Tensor, Any]:
        if shard.segments.part_starts[0]:
            raise ValueError("broken on purpose")
        return super().forward(x, shard, state)


class NotAModule:
    """No mixer."""
