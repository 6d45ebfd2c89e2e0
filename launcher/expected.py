"""What a training step should receive, by the formulas that `longhaul verify --bytes` holds the engines to.

What a model asks of its door is noted once, on a few tokens; with it, and with the documents of a step's streams, the formulas
say what each kind of traffic should be. Kinds that have no formula here (gradients, what `auto` picks, a reach that is
cut) are left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from longhaul.launcher.verify.formulas import ATTENTIONS, PREFIXES, Attention, Prefix
from longhaul.models.ops.affine import accumulate_dtype
from longhaul.models.ops.attention import Mask
from longhaul.models.ops.recurrence import Recurrence
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import SequenceShard
from longhaul.parallel.comm import Comm
from longhaul.parallel.data import DataParallel
from longhaul.parallel.engine import SequenceParallel
from longhaul.parallel.exchange.all_gather import AllGather
from longhaul.parallel.exchange.base import Exchange
from longhaul.parallel.exchange.hierarchical import Hierarchical

from .batches import place
from .data import Stream

FEW_TOKENS = 64  # through which a model shows what it asks for


class Scan(NamedTuple):
    """A recurrence: numbers of a packed map, of a state and of its value axis; bytes of one."""

    packed: int
    state: int
    values: int
    size: int


class Halo(NamedTuple):
    """Left context: numbers of one part's, bytes of one."""

    numbers: int
    size: int


class Attend(NamedTuple):
    """A softmax attention: heads, key heads, widths of keys and values, bytes of a number and of an accumulated one."""

    mask: Mask
    heads: int
    key_heads: int
    widths: tuple[int, int]
    size: int
    wide: int


class ExpectedTraffic:
    """Bytes by label that this rank should receive in a step.

    Args:
        calls: of the door in one forward.
        engine: that serves them.
        keep_state: streams hand their state on.
        recomputes: layers are run again in the backward.
    """

    def __init__(
        self, calls: Iterable[Scan | Halo | Attend], engine: SequenceParallel, keep_state: bool, recomputes: bool
    ) -> None:
        self.calls, self.engine, self.keep_state = Counter(calls), engine, keep_state
        self.prefix = _prefix_name(engine.exchange)
        attention = engine.attention
        again = recomputes and attention.name in ("ulysses", "usp")  # which then send once more
        usual = getattr(attention, "backward", "auto") == "auto"
        self.attention = attention.name if usual and not again else None

    def of(self, streams: Sequence[Stream]) -> dict[str, int]:
        """Of a step on these streams."""
        found: Counter[str] = Counter()
        for stream in streams:
            documents = Documents(stream.bounds, stream.first_position)
            for call, count in self.calls.items():
                for label, size in self._bytes(call, documents).items():
                    found[label] += count * size
        return dict(found)

    def _bytes(self, call: Scan | Halo | Attend, documents: Documents) -> dict[str, int]:
        comm, layout = self.engine.comm, self.engine.layout(documents)
        if isinstance(call, Halo):
            once = (comm.size - 1) * layout.num_parts * call.numbers * call.size
            return {"halo forward": once, "halo backward": once}
        if isinstance(call, Attend):
            if self.attention is None:
                return {}
            inner = self.engine.attention.inner.size if self.attention == "usp" else 1  # type: ignore[attr-defined]
            case = Attention(
                layout, documents, call.mask, call.heads, call.key_heads, call.widths, comm.rank, inner, call.wide // call.size
            )
            return {label: cost.bytes(call.size, call.wide) for label, cost in ATTENTIONS[self.attention](case).items()}
        if self.prefix is None:
            return {}
        exchange, chain, found = self.engine.exchange, layout.chain(documents), {}
        for label, reverse in (("state forward", False), ("state backward", True)):
            inner = exchange.inside.comm.size if isinstance(exchange, Hierarchical) else 1
            end = self.keep_state and not reverse  # gradients end where a stream begins
            case_of_state = Prefix(
                chain, comm.rank, comm.size, layout.num_parts, call.packed, call.state, call.values, reverse, end,
                self.keep_state, inner,
            )  # fmt: skip
            cost = PREFIXES[self.prefix](case_of_state)
            found[label] = cost.bytes(call.size, call.size)
            if isinstance(exchange, AllGather) and exchange.rounds:  # offsets of two bytes
                found[label] = found[label] // (call.packed * call.size) * (
                    2 * call.state + (call.packed - call.state) * call.size
                )
        return found


def _prefix_name(exchange: Exchange) -> str | None:
    """Which formula of a prefix an exchange has, if any."""
    name = getattr(exchange, "name", "")
    if isinstance(exchange, Hierarchical):
        inside, across = exchange.inside, exchange.across
        usual = isinstance(inside, AllGather) and not inside.rounds and getattr(across, "name", "") in ("all_scan", "ring")
        return name if usual else None
    return name if name in PREFIXES else None


@torch.no_grad()
def expected_traffic(
    model: DataParallel,
    engine: SequenceParallel,
    stream: Stream,
    device: torch.device,
    *,
    bf16: bool = False,
    keep_state: bool = False,
    recomputes: bool = False,
) -> ExpectedTraffic:
    """Run the first few tokens of a stream to see what the model asks for; all ranks take part, each with all those tokens."""
    stop = min(FEW_TOKENS, stream.tokens.shape[0])
    bounds = (*(bound for bound in stream.bounds if bound < stop), stop)
    short = Stream(stream.tokens[:stop], stream.labels[:stop], stream.weights[:stop], bounds, stream.first_position)
    alone = SequenceParallel(Comm(None, engine.ledger), tensor=engine.tensor)  # so that no exchange takes these for usual tokens
    batch, calls = place(short, alone, device), list[Scan | Halo | Attend]()
    training = model.model.training
    model.model.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        shard = cast(SequenceShard, _Noting(batch.shard, calls))
        model(batch.tokens, shard, None, labels=batch.labels, weights=batch.weights)
    model.model.train(training)
    return ExpectedTraffic(calls, engine, keep_state, recomputes)


class _Noting:
    """A shard that notes what is asked of it."""

    def __init__(self, shard: SequenceShard, calls: list[Scan | Halo | Attend]) -> None:
        self._shard, self._calls = shard, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shard, name)

    def scan(self, op: Recurrence, x: Sequence[Tensor | None], *args: Any, **kwargs: Any) -> Any:
        device = next(tensor.device for tensor in x if tensor is not None)
        with torch.autocast(device.type, enabled=False):
            maps = op.summarize(tuple(x), self._shard.segments).maps
        packed = maps.pack()
        state = maps.offset[0].numel() * (2 if maps.offset.is_complex() else 1)
        self._calls.append(Scan(packed.shape[1], state, maps.offset.shape[-1], packed.element_size()))
        return self._shard.scan(op, x, *args, **kwargs)

    def halo(self, x: Tensor, width: int, *args: Any, **kwargs: Any) -> Any:
        self._calls.append(Halo(width * math.prod(x.shape[1:]), x.element_size()))
        return self._shard.halo(x, width, *args, **kwargs)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask = Mask(), *args: Any, **kwargs: Any) -> Any:
        dtype = torch.promote_types(q.dtype, torch.promote_types(k.dtype, v.dtype))
        widths = (k.shape[2], v.shape[2])
        wide = accumulate_dtype(dtype).itemsize
        self._calls.append(Attend(mask, q.shape[1], k.shape[1], widths, dtype.itemsize, wide))
        return self._shard.attend(q, k, v, mask, *args, **kwargs)
