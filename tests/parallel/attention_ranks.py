"""What the attention tests run on ranks: one attention against one process, and what it cost."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from longhaul.launcher.verify.exactness import error
from longhaul.models.ops import recompute
from longhaul.models.ops.attention import Mask
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import KVState, SequenceShard, WholeSequence
from longhaul.parallel.attention.base import Engine
from longhaul.parallel.attention.registry import make_attention
from longhaul.parallel.comm import Comm
from longhaul.parallel.exchange.all_gather import AllGather
from longhaul.parallel.layout import LAYOUTS, SequenceLayout
from longhaul.parallel.shard import RankShard
from tests.harness.cases import document_tables, rank_lengths

MASKS = (Mask(), Mask(causal=False), Mask(window=5), Mask(causal=False, window=4))
HEADS = ((4, 2), (3, 3), (6, 2), (2, 1), (6, 3))  # with 4 ranks: ranks without a head, key heads that are replicated
WIDTHS = (4, 3)  # K, V
STATES = ((0, False), (0, True), (6, True), (6, False))  # first position, state kept


class Case(NamedTuple):
    """One cell: the arguments of an attention and of its layout."""

    layout: str
    options: dict[str, Any]
    bounds: tuple[int, ...]
    mask: Mask
    heads: tuple[int, int]
    first_position: int = 0
    keep_state: bool = False


def cases(num_tokens: int, ranks: int, every: int) -> Iterator[Case]:
    """Layouts x masks x tables of documents, states and heads drawn for each; one in `every` of them, at random."""
    layouts: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in LAYOUTS]
    layouts += [("striped", {"block": 1})]
    layouts += [("contiguous", {"lengths": lengths}) for lengths in rank_lengths(num_tokens, ranks).values()]
    draw = random.Random(ranks)
    product = list(itertools.product(layouts, MASKS, document_tables(num_tokens).values()))
    draw.shuffle(product)
    for index, ((name, options), mask, bounds) in enumerate(product[: -(-len(product) // every)]):
        yield Case(name, options, bounds, mask, HEADS[index % len(HEADS)], *STATES[index % len(STATES)])


def make_engine(name: str, comm: Comm, **options: Any) -> Engine:
    """By name; USP with groups of `inner` ranks."""
    if name != "usp":
        return make_attention(name, comm, **options)
    size, ranks = options["inner"], comm.size
    inner = [dist.new_group(list(range(a, a + size))) for a in range(0, ranks, size)]
    outer = [dist.new_group(list(range(i, ranks, size))) for i in range(size)]
    groups = inner[comm.rank // size], outer[comm.rank % size]
    return make_attention(name, comm, inner=Comm(groups[0], comm.ledger), outer=Comm(groups[1], comm.ledger))


class Inputs(NamedTuple):
    """The same on every rank: q, k, v, the output's cotangent, and the states' if there are any."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    state: KVState | None
    documents: Documents


def make_inputs(case: Case, dtype: torch.dtype = torch.float64) -> Inputs:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tokens, (heads, key_heads), (K, V) = case.bounds[-1], case.heads, WIDTHS
    before = case.first_position if case.mask.window is None else min(case.first_position, case.mask.window - 1)
    state = KVState(normal(before, key_heads, K), normal(before, key_heads, V)) if before else None
    tensors = normal(tokens, heads, K), normal(tokens, key_heads, K), normal(tokens, key_heads, V), normal(tokens, heads, V)
    return Inputs(*tensors, state, Documents(case.bounds, case.first_position))


def attend(
    shard: SequenceShard, inputs: Inputs, mask: Mask, rows: list[tuple[int, int]], checkpointed: bool = False
) -> dict[str, Tensor]:
    """Output, final state and every gradient of some rows."""
    own = [torch.cat([x[:0], *(x[a:b] for a, b in rows)]).requires_grad_() for x in inputs[:3]]
    dout = torch.cat([inputs.dout[:0], *(inputs.dout[a:b] for a, b in rows)])
    past = None if inputs.state is None else KVState(*(x.clone().requires_grad_() for x in inputs.state))

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, KVState | None]:
        return shard.attend(q, k, v, mask, past, 0.3)

    out, end = recompute.checkpoint(function, *own) if checkpointed else function(*own)
    ends = () if end is None else tuple(end)
    torch.autograd.backward([out, *ends], [dout, *(x.detach().flip(0) for x in ends)])
    found = {"out": out.detach(), "dq": own[0].grad, "dk": own[1].grad, "dv": own[2].grad}
    found |= {f"end {i}": x.detach() for i, x in enumerate(ends)}
    if past is not None:
        found |= {f"dpast {i}": x.grad for i, x in enumerate(past)}
    return found


def make_shard(comm: Comm, engine: Engine, case: Case, documents: Documents) -> RankShard:
    layout = SequenceLayout.make(case.layout, documents, comm.size, **case.options)
    return RankShard(layout, documents, comm, AllGather(comm), engine, keep_state=case.keep_state)


def errors(comm: Comm, engine: Engine, case: Case, dtype: torch.dtype = torch.float64) -> dict[str, float]:
    """Of every tensor on this rank, against one process."""
    inputs = make_inputs(case, dtype)
    whole = WholeSequence(inputs.documents, keep_state=case.keep_state)
    shard = make_shard(comm, engine, case, inputs.documents)
    rows = list(shard.layout.parts[comm.rank])
    expected = attend(whole, inputs, case.mask, [(0, case.bounds[-1])])
    found = attend(shard, inputs, case.mask, rows)
    assert found.keys() == expected.keys()
    for name in ("out", "dq", "dk", "dv"):
        expected[name] = torch.cat([expected[name][:0], *(expected[name][a:b] for a, b in rows)])
    return {name: error(found[name], expected[name]) for name in expected}


def exactness(
    rank: int, world_size: int, engine: str, options: dict[str, Any], num_tokens: int, every: int, dtype: torch.dtype
) -> dict[str, tuple[float, str]]:
    """The worst error of every tensor over the cases, with where it was."""
    comm = Comm(dist.group.WORLD)
    served, worst = make_engine(engine, comm, **options), {}
    for case in cases(num_tokens, world_size, every):
        if engine == "rsa" and case.mask.window is not None:
            continue
        for name, value in errors(comm, served, case, dtype).items():
            if not value <= worst.get(name, (-1.0, ""))[0]:
                worst[name] = (value, str(case))
    return worst


def under_autocast(rank: int, world_size: int, **call: Any) -> dict[str, tuple[float, str]]:
    """`exactness` where matrix products would be lowered to bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        return exactness(rank, world_size, **call)


def traffic(
    rank: int, world_size: int, engine: str, options: dict[str, Any], case: Case, checkpointed: bool = False
) -> dict[str, Any]:
    """Bytes received by (label, kind) in a forward and a backward, in float32."""
    comm = Comm(dist.group.WORLD)
    inputs = make_inputs(case, torch.float32)
    shard = make_shard(comm, make_engine(engine, comm, **options), case, inputs.documents)
    attend(shard, inputs, case.mask, list(shard.layout.parts[rank]), checkpointed)
    return {key: count.bytes for key, count in comm.ledger.counts.items()}
