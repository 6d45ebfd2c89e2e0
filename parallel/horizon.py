"""How far back a model's recurrent layers look on a stream, and how large their states grow, layer by layer.

A shard that watches is given to a model instead of the plain one, in a forward made for that alone: the model knows
nothing of it, and training steps do no more than before. Layers are told apart by the order in which they ask the door.

Legend: T tokens held here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from longhaul.models.ops.affine import AffineMap, Constant, LogScale
from longhaul.models.ops.recurrence import Recurrence
from longhaul.models.ops.segments import Documents, Segments
from longhaul.models.sequence import SequenceShard

from .comm import Comm
from .exchange.reach import effective_horizon

LABEL = "effective horizon"


class StateWatch:
    """The log decays of every recurrence on the tokens of this rank, and the states that they end with.

    Recurrences whose maps are matrices have no decay of their own: of them the state alone is seen.
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] = []  # of each recurrence, over the tokens held here, shaped like its decays
        self._norms: list[Tensor] = []
        self._tokens = 0

    def watch(self, shard: SequenceShard) -> SequenceShard:
        """The same shard, with recurrences noted."""
        self._tokens = shard.num_tokens
        return cast(SequenceShard, _Watched(shard, self))

    def see(self, op: Recurrence, x: Sequence[Tensor | None], own: Segments) -> None:
        """Note one recurrence."""
        tokens = own.num_tokens
        # As one part without a document's start: maps of parts that are cut do not count all their tokens.
        segments = Segments(Documents((0, tokens), first_position=1), [(0, tokens)]) if tokens else own
        device = next(tensor.device for tensor in x if tensor is not None)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            linear = op.summarize(tuple(x), segments).maps.linear
        if isinstance(linear, Constant):
            self._sums.append(tokens * linear.log_decay.real.double())
        elif isinstance(linear, LogScale):
            self._sums.append(linear.value.double().sum(0))

    def horizons(self, sequence: Comm, tensor: Comm) -> list[float]:
        """Tokens after which less than `exp(-20)` of a state is left in the slowest head of each recurrence; on all ranks alike.

        Args:
            sequence: the ranks that hold the other tokens of the stream.
            tensor: the ranks that hold the other heads.
        """
        if not self._sums:
            return []
        flat = torch.cat([own.reshape(-1) for own in self._sums])
        flat = torch.cat([flat, flat.new_tensor([self._tokens])])
        flat = sequence.all_reduce(flat, LABEL).wait()
        tokens, found = int(flat[-1].item()), []
        for total in flat[:-1].split([own.numel() for own in self._sums]):
            found.append(effective_horizon(AffineMap(total[None], LogScale(total[None])), [tokens]).max())
        whole: Tensor = tensor.all_reduce(torch.stack(found), LABEL, dist.ReduceOp.MAX).wait()
        return whole.tolist()


    def see_state(self, state: Tensor | None) -> None:
        """Note the state [H, ...] after a stream."""
        if state is not None:
            self._norms.append(torch.linalg.vector_norm(state.flatten(1), dim=1).max().double())

    def largest_norm(self, tensor: Comm) -> float | None:
        """The largest norm of a head's state at the stream's end, over all recurrences; on all ranks alike. None: no state."""
        if not self._norms:
            return None
        whole: Tensor = tensor.all_reduce(torch.stack(self._norms).max(), LABEL, dist.ReduceOp.MAX).wait()
        return float(whole)


class _Watched:
    """A shard that shows its recurrences to a watch."""

    def __init__(self, shard: SequenceShard, watch: StateWatch) -> None:
        self._shard, self._watch = shard, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shard, name)

    def scan(self, op: Recurrence, x: Sequence[Tensor | None], state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        self._watch.see(op, x, self._shard.segments)
        out, after = self._shard.scan(op, x, state)
        self._watch.see_state(after)
        return out, after
