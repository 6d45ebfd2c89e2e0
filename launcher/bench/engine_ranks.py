"""What `bench engines` runs on ranks: one layer, forward and backward, with and without its communication.

Legend: T tokens of a rank, P ranks, H heads, K key width, V value width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch

from longhaul.models.ops.affine import AffineMap, Constant, Dense, Linear
from longhaul.models.ops.delta_rule.chunk import DeltaRule, delta_inputs
from longhaul.models.ops.recurrence import EachPart, Inputs, Recurrence, scan
from longhaul.models.ops.scalar_decay.chunk import ScalarDecay
from longhaul.models.ops.segments import Documents, Segments
from longhaul.models.sequence import KVState, WholeSequence
from longhaul.parallel.comm import Comm, Wire
from longhaul.parallel.engine import SequenceParallel
from longhaul.parallel.exchange.auto import MEASURED
from longhaul.parallel.exchange.base import Exchange
from longhaul.parallel.exchange.registry import make_exchange
from longhaul.parallel.layout import SequenceLayout
from longhaul.parallel.runtime import Runtime

from . import kv_ring
from .kv_ring import Computed, Kernels, Seconds, Slept

Work = Callable[[], None]
KV_RING = "kv_ring"  # beside the names of exchanges


class Layer(NamedTuple):
    """Shape of the layer, and of a linear one the kind of map: constant decays, so that a state is all that travels, or
    (`dense`) the delta rule, whose M travels with gathers and logarithmic scans."""

    heads: int
    width: int  # K and V
    dense: bool = False

    def decays(self) -> torch.Tensor:
        return -torch.linspace(1e-4, 1e-2, self.heads)

    def op(self) -> Recurrence:
        return DeltaRule() if self.dense else ScalarDecay(self.decays())

    def inputs(self, tokens: int) -> Inputs:
        """Random inputs of `op`, leaves that require gradients."""
        q, k, v = (torch.randn(tokens, self.heads, self.width) for _ in range(3))
        x: Inputs = (q, k, v, None)
        if self.dense:
            x = delta_inputs(q, torch.nn.functional.normalize(k, dim=-1), v, torch.full((tokens, self.heads), 0.5))
        return tuple(None if tensor is None else tensor.detach().requires_grad_() for tensor in x)

    def linear(self, tokens: int) -> Linear:
        """A linear part of one map, as `op` would make it."""
        if self.dense:
            return Dense(0.9 * torch.eye(self.width).expand(1, self.heads, -1, -1).contiguous())
        return Constant(self.decays(), [tokens])


class Phases(NamedTuple):
    """Seconds of the six phases of a scan, measured alone."""

    summarize: float
    local: float
    correct: float
    reverse: float
    local_backward: float
    correct_backward: float


class Cell(NamedTuple):
    """One measurement. `phases`: sleep these instead of computing, and `fixed`: those of a single token."""

    kind: str  # linear or softmax
    engine: str
    tokens: int  # of the whole sequence
    phases: Phases | None = None
    fixed: Phases | None = None
    blocks: Seconds | None = None  # the same for the kernels of a ring of keys and values
    fixed_blocks: Seconds | None = None
    cut: int | None = None  # blocks of a state in the all-scan; None: as it thinks best


def measure_phases(layer: Layer, tokens: int, repeats: int = 5) -> Phases:
    """Medians of the phases on T tokens of one rank, in this process, with a state coming in and a cotangent."""
    op = layer.op()
    segments = Segments(Documents((0, tokens), first_position=1), [(0, tokens)])
    x = tuple(None if tensor is None else tensor.detach() for tensor in layer.inputs(tokens))
    dout, state = torch.randn(tokens, layer.heads, layer.width), op.zero_state(x, segments)
    times: list[list[float]] = [[] for _ in Phases._fields]

    def clocked(index: int, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = run()
        times[index].append(time.perf_counter() - start)
        return result

    for _ in range(repeats + 1):
        summary = clocked(0, lambda: op.summarize(x, segments))
        out = clocked(1, lambda: op.local(x, segments, summary))  # noqa: B023
        out = clocked(2, lambda: op.correct(out, x, segments, summary, state))  # noqa: B023
        reverse = clocked(3, lambda: op.reverse(x, segments, summary.saved, dout))  # noqa: B023
        args = (x, segments, summary.saved)
        partial = clocked(4, lambda: op.local_backward(*args, dout, state, reverse))  # noqa: B023
        clocked(5, lambda: op.correct_backward(*args, out, dout, state, state, partial))  # noqa: B023
    return Phases(*(median(column[1:]) for column in times))


def measure_blocks(layer: Layer, tokens: int, repeats: int = 3) -> Seconds:
    """Medians of the kernels of a ring of keys and values (`kv_ring`) on blocks of T tokens, in this process."""
    kernels, shape = Computed(layer.decays()), (tokens, layer.heads, layer.width)
    q, k, v, dout = (torch.randn(shape) for _ in range(4))
    runs: list[Callable[[], Any]] = [
        lambda: kernels.own(q, k, v),
        lambda: kernels.own_backward(dout),
        lambda: kernels.other(q, k, v, tokens),
        lambda: kernels.other_backward(q, k, v, tokens, dout),
    ]
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats + 1):
        for column, run in zip(times, runs):
            start = time.perf_counter()
            run()
            column.append(time.perf_counter() - start)
    return Seconds(*(median(column[1:]) for column in times))


def ring_of_blocks(layer: Layer, comm: Comm, tokens: int, seconds: Seconds | None) -> tuple[Work, Work]:
    """A ring of keys and values, and its local work alone; `seconds`: slept."""
    kernels: Kernels = Computed(layer.decays()) if seconds is None else Slept(seconds)
    bounds = [start for ((start, _),) in SequenceLayout.contiguous(tokens, comm.size).parts] + [tokens]
    shape = (bounds[comm.rank + 1] - bounds[comm.rank], layer.heads, layer.width)
    tensors = [torch.randn(shape) for _ in range(4)]

    def full() -> None:
        kv_ring.forward_backward(comm, kernels, bounds, *tensors)

    return full, lambda: kv_ring.alone(comm, kernels, bounds, *tensors)


def linear_computed(layer: Layer, comm: Comm, exchange: Exchange, tokens: int) -> tuple[Work, Work]:
    """The op with its exchange, and alone."""
    op = layer.op()
    shard = SequenceParallel(comm).shard(Documents((0, tokens)))
    chain = SequenceLayout.contiguous(tokens, comm.size).chain(Documents((0, tokens)))
    x = layer.inputs(shard.num_tokens)
    dy = torch.randn(shard.num_tokens, layer.heads, layer.width)

    def run(carry: Any) -> None:
        scan(op, x, shard.segments, carry)[0].backward(dy)

    return lambda: run(Bound(exchange, chain)), lambda: run(EachPart(shard.segments))


class Bound:
    """An exchange on one chain."""

    def __init__(self, exchange: Exchange, chain: Sequence[Any]) -> None:
        self.exchange, self.chain = exchange, chain

    def start(self, maps: AffineMap, initial: Any, reverse: bool, want_end: bool) -> Any:
        return self.exchange.start(maps, self.chain, initial, reverse, want_end)

    def mark(self, event: str) -> None:
        self.exchange.comm.ledger.mark(event)


def linear_slept(layer: Layer, comm: Comm, exchange: Exchange | None, tokens: int, phases: Phases) -> Work:
    """The order of a scan with sleeps for its phases; the exchange is real (None: there is none)."""
    chain = SequenceLayout.contiguous(tokens, comm.size).chain(Documents((0, tokens)))
    length = next(link.length for link in chain if link.owner == comm.rank)
    state = torch.randn(1, layer.heads, layer.width, layer.width)
    maps = AffineMap(state, layer.linear(length))
    adjoint = maps.adjoint(torch.zeros_like(state) if comm.rank == 0 else state)

    def run() -> None:
        for reverse, (before, beside, after) in ((False, phases[:3]), (True, phases[3:])):
            time.sleep(before)
            pending = None if exchange is None else exchange.start(adjoint if reverse else maps, chain, None, reverse)
            time.sleep(beside)
            if pending is not None:
                pending.wait()
            time.sleep(after)

    return run


def softmax_computed(layer: Layer, comm: Comm, engine: str, tokens: int) -> tuple[Work, Work]:
    """Causal attention through an engine, and the same queries against all keys they see, held here."""
    documents = Documents((0, tokens))
    parallel = SequenceParallel(comm, attention=engine)
    shard = parallel.shard(documents)
    ((start, stop),) = parallel.local_tokens(documents)
    q, k, v = (torch.randn(stop - start, layer.heads, layer.width, requires_grad=True) for _ in range(3))
    past = [torch.randn(start, layer.heads, layer.width, requires_grad=True) for _ in range(2)]
    dy = torch.randn(stop - start, layer.heads, layer.width)
    alone = WholeSequence(Documents((0, stop - start), first_position=start))
    state = KVState(*past) if start else None
    return (
        lambda: shard.attend(q, k, v)[0].backward(dy),
        lambda: alone.attend(q, k, v, state=state)[0].backward(dy),
    )


def clocked(runtime: Runtime, work: Work) -> float:
    """Seconds of one run that all ranks begin together."""
    runtime.barrier()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(
    runtime: Runtime, layer: Layer, cells: Sequence[Cell], wire: tuple[float, float | None] | None, repeats: int
) -> dict[str, Any]:
    """On one rank, by position in `cells`: paired seconds with and without communication, fixed overhead, traffic."""
    return {str(index): _measure(runtime, layer, cell, wire, repeats) for index, cell in enumerate(cells)}


def _measure(runtime: Runtime, layer: Layer, cell: Cell, wire: tuple[float, float | None] | None, repeats: int) -> dict[str, Any]:
    torch.manual_seed(runtime.rank)
    comm = runtime.comm()
    comm.wire = None if wire is None else Wire(*wire)
    if cell.kind == "softmax":
        full, alone = softmax_computed(layer, comm, cell.engine, cell.tokens)
        _, one = softmax_computed(layer, comm, cell.engine, comm.size)
    elif cell.engine == KV_RING:
        full, alone = ring_of_blocks(layer, comm, cell.tokens, cell.blocks)
        _, one = ring_of_blocks(layer, comm, comm.size, cell.fixed_blocks)
    else:
        exchange = make_exchange(cell.engine, comm, **({"blocks": cell.cut} if cell.engine == "all_scan" else {}))
        if cell.phases is not None and cell.fixed is not None:
            full = linear_slept(layer, comm, exchange, cell.tokens, cell.phases)
            alone, one = (linear_slept(layer, comm, None, cell.tokens, phases) for phases in (cell.phases, cell.fixed))
        else:
            full, alone = linear_computed(layer, comm, exchange, cell.tokens)
            _, one = linear_computed(layer, comm, exchange, comm.size)
    for _ in range(MEASURED + 1 if cell.engine == "auto" else 1):
        full()
        alone()
        one()
    comm.ledger.reset()
    full()
    count = comm.ledger.total()
    pairs = []
    for repeat in range(repeats):
        seconds = {}
        for with_wire in (True, False) if repeat % 2 else (False, True):
            seconds[with_wire] = clocked(runtime, full if with_wire else alone)
        pairs.append((seconds[True], seconds[False], clocked(runtime, one)))
    return {"pairs": pairs, "messages": count.messages, "bytes": count.bytes}
