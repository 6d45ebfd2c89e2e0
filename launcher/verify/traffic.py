"""`longhaul verify --bytes`: messages and bytes each engine received, against its formula, rank by rank.

Exchanges get maps of three kinds directly, attention engines queries, keys and values, the door's other calls a few numbers a
token, in float32 throughout: what is counted is an engine, no mixer. Legend: P ranks, N parts of a rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from longhaul.models.errors import UserError
from longhaul.models.ops.affine import AffineMap, Dense, Identity, Linear, LogScale
from longhaul.models.ops.attention import Mask
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import Element
from longhaul.parallel.attention.registry import ENGINES, make_attention
from longhaul.parallel.comm import Comm
from longhaul.parallel.exchange.registry import EXCHANGES, make_exchange
from longhaul.parallel.layout import SequenceLayout
from longhaul.parallel.shard import RankShard

from . import formulas
from .cells import inner_size
from .formulas import ATTENTIONS, PREFIXES, Attention, Costs, Prefix
from .tables import layout_of

if TYPE_CHECKING:
    from .ranks import Pool

HEADS, WIDTH_K, WIDTH_V = 2, 3, 5
FLOAT32 = 4
TABLES = {"one": (0, 30), "edge": (0, 10, 15, 20, 30), "mixed": (0, 1, 3, 22, 30)}
LAYOUTS = ("contiguous", "empty_first", "zigzag", "zigzag_per_document")
MASKS = (Mask(), Mask(causal=False), Mask(window=5))
HEAD_COUNTS = ((4, 2), (3, 3))
CHOICES = ("auto",)  # exchanges that are one of the others
DOOR = ("halo", "prefix", "total", "document_sum")
BLOCKS = 2  # of all_scan
HALO = 3  # tokens; some parts and documents are shorter

Counted = dict[str, tuple[float, float]]  # what -> (measured, formula)


class Question(NamedTuple):
    """One engine on one layout and table.

    Attributes:
        kind: "exchange", "attention" or "door".
    """

    kind: str
    engine: str
    layout: str
    documents: str
    ranks: int


@dataclass(frozen=True)
class Row:
    """One engine on so many ranks, summed over cases and ranks."""

    kind: str
    engine: str
    ranks: int
    cases: int
    messages: int
    messages_formula: int
    bytes: int
    bytes_formula: int
    equal: bool
    message: str = ""
    """The first case that differs, or why nothing was counted."""


def questions(ranks: Sequence[int], engines: Sequence[str]) -> Iterator[Question]:
    """All of `--bytes`."""
    everything = [("exchange", name) for name in EXCHANGES if name not in CHOICES] + [("attention", name) for name in ENGINES]
    everything += [("door", name) for name in DOOR]
    wanted = [(kind, name) for kind, name in everything if not engines or name in engines]
    if not wanted:
        known = ", ".join(dict.fromkeys(name for _, name in everything))
        raise UserError(f"--engine {engines[0]!r} has no formula of its own: choose from {known}.")
    for size, (kind, name), layout, table in itertools.product(ranks, wanted, LAYOUTS, TABLES):
        if layout_of(layout, size) is not None:
            yield Question(kind, name, layout, table, size)


def count(question: Question, comm: Comm, inner: Comm, outer: Comm) -> Counted:
    """Measured and expected, on this rank; nothing for a layout the engine refuses.

    Args:
        inner, outer: groups of two-level engines, with the ledger of `comm`.
    """
    documents = Documents(TABLES[question.documents])
    # `tables` knows layouts of its own length; here only their shares matter.
    named = layout_of(question.layout, comm.size)
    assert named is not None, "asked for on this many ranks only where it exists"
    lengths = [0, *(len(run) for run in _chunks(documents.num_tokens, comm.size - 1))] if named[1] else None
    options = {"lengths": lengths} if lengths else {}
    layout = SequenceLayout.make(named[0], documents, comm.size, **options)
    if question.kind == "exchange":
        return _count_exchange(question.engine, documents, layout, comm, inner, outer)
    if question.kind == "door":
        return _count_door(question.engine, documents, layout, comm)
    return _count_attention(question.engine, documents, layout, comm, inner, outer)


def _compare(comm: Comm, expected: Costs, where: str) -> Counted:
    """The ledger's labels against the formula's: no label more, none less."""
    found: Counted = {}
    for label in dict.fromkeys((*expected, *(label for label, _ in comm.ledger.counts))):
        measured, cost = comm.ledger.total(label), expected.get(label, formulas.Cost())
        found[f"messages: {label}, {where}"] = measured.messages, cost.messages
        found[f"bytes: {label}, {where}"] = measured.bytes, cost.bytes(FLOAT32, FLOAT32)
    return found or {f"messages: {where}": (0, 0), f"bytes: {where}": (0, 0)}


def _chunks(total: int, pieces: int) -> list[range]:
    return [range(total * i // pieces, total * (i + 1) // pieces) for i in range(pieces)]


def _count_exchange(
    name: str, documents: Documents, layout: SequenceLayout, comm: Comm, inner: Comm, outer: Comm
) -> Counted:
    levels = {"intra": inner, "inter": outer, "across": "ring"}
    options: dict[str, dict[str, Any]] = {"all_scan": {"blocks": BLOCKS}, "hierarchical": levels}
    exchange = make_exchange(name, comm, **options.get(name, {}))
    try:
        exchange.check(layout)
    except UserError:
        return {}
    chain, parts = layout.chain(documents), layout.num_parts
    state = HEADS * WIDTH_K * WIDTH_V
    found: Counted = {}
    linears: dict[str, tuple[Linear, int]] = {
        "identity": (Identity(), 0),
        "decay": (LogScale(torch.zeros(parts, HEADS)), HEADS),
        "dense": (Dense(torch.zeros(parts, HEADS, WIDTH_K, WIDTH_K)), HEADS * WIDTH_K * WIDTH_K),
    }
    for (kind, (linear, numbers)), reverse, ends in itertools.product(linears.items(), (False, True), (False, True)):
        initial = torch.zeros(HEADS, WIDTH_K, WIDTH_V) if ends else None
        maps = AffineMap(torch.zeros(parts, HEADS, WIDTH_K, WIDTH_V), linear)
        comm.ledger.reset()
        exchange.start(maps, chain, initial, reverse, ends).wait()
        case = Prefix(
            chain, comm.rank, comm.size, parts, state + numbers, state, WIDTH_V, reverse, ends, ends, inner_size(comm.size)
        )
        expected = {"state backward" if reverse else "state forward": PREFIXES[name](case)}
        found |= _compare(comm, expected, f"{kind} maps, {'with' if ends else 'without'} outer states")
    return found


def _count_attention(
    name: str, documents: Documents, layout: SequenceLayout, comm: Comm, inner: Comm, outer: Comm
) -> Counted:
    engine = make_attention(name, comm, **({"inner": inner, "outer": outer} if name == "usp" else {}))
    found: Counted = {}
    for mask, (heads, key_heads) in itertools.product(MASKS, HEAD_COUNTS):
        try:
            engine.check(mask)
        except UserError:
            continue
        shard = RankShard(layout, documents, comm, make_exchange("all_gather", comm), engine)
        shapes = (heads, WIDTH_K), (key_heads, WIDTH_K), (key_heads, WIDTH_V)
        q, k, v = (torch.randn(shard.num_tokens, *shape, requires_grad=True) for shape in shapes)
        comm.ledger.reset()
        shard.attend(q, k, v, mask)[0].sum().backward()
        size = inner_size(comm.size)
        case = Attention(layout, documents, mask, heads, key_heads, (WIDTH_K, WIDTH_V), comm.rank, size)
        where = f"{heads} and {key_heads} heads, {'causal' if mask.causal else 'both ways'}, window {mask.window}"
        found |= _compare(comm, ATTENTIONS[name](case), where)
    return found


class _Sum:
    """The merge of two sums."""

    def empty(self, like: Element) -> Element:
        return tuple(torch.zeros_like(tensor) for tensor in like)

    def combine(self, earlier: Element, later: Element) -> Element:
        return tuple(a + b for a, b in zip(earlier, later))


def _count_door(name: str, documents: Documents, layout: SequenceLayout, comm: Comm) -> Counted:
    found: Counted = {}
    parts, ranks = layout.num_parts, comm.size
    for continued in (False, True):
        stream = Documents(documents.bounds, 2 if continued else 0)
        exchange, attention = make_exchange("all_gather", comm), make_attention("all_gather", comm)
        shard = RankShard(layout, stream, comm, exchange, attention, keep_state=continued)
        x = torch.randn(shard.num_tokens, WIDTH_K, requires_grad=True)
        states = [torch.randn(*shape, requires_grad=True) for shape in ((HALO, WIDTH_K), (WIDTH_K,), (WIDTH_V,))]
        comm.ledger.reset()
        given: Any
        if name == "halo":
            context, after = shard.halo(x, HALO, states[0] if continued else None)
            given = [context, *([] if after is None else [after])]
            expected = formulas.halo(ranks, parts, HALO, WIDTH_K, continued)
        elif name == "prefix":
            element = tuple(torch.randn(parts, width, requires_grad=True) for width in (WIDTH_K, WIDTH_V))
            before, end = shard.prefix(_Sum(), element, tuple(states[1:]) if continued else None)
            given = [*before, *(end or ())]
            expected = formulas.prefix(ranks, parts, [WIDTH_K, WIDTH_V], continued)
        elif name == "total":
            given = [shard.total(x, "document" if continued else "sequence")]
            expected = formulas.total(ranks, WIDTH_K * (stream.num_documents if continued else 1))
        else:
            given = [shard.document_sum(torch.randn(shard.segments.num_segments, WIDTH_K, requires_grad=True))]
            expected = formulas.document_sum(ranks, layout, stream, WIDTH_K)
        torch.autograd.backward(given, [torch.ones_like(tensor) for tensor in given])
        found |= _compare(comm, expected, "continued" if continued else "fresh")
    return found


def measure(ranks: Sequence[int], engines: Sequence[str]) -> list[Row]:
    """Ask pools of ranks all questions."""
    from .ranks import Pool  # which imports this module, to answer

    asked: dict[tuple[str, str, int], list[Question]] = {}
    for question in questions(ranks, engines):
        asked.setdefault((question.kind, question.engine, question.ranks), []).append(question)
    rows: list[Row] = []
    pool: Pool | None = None
    try:
        for (kind, engine, size), own in asked.items():
            if pool is None or pool.size != size:
                if pool is not None:
                    pool.close()
                pool = Pool(size, "cpu")
            rows.append(_row(kind, engine, size, own, pool))
    finally:
        if pool is not None:
            pool.close()
    return rows


def _row(kind: str, engine: str, size: int, own: Sequence[Question], pool: Pool) -> Row:
    formulas: dict[str, Container[str]] = {"exchange": PREFIXES, "attention": ATTENTIONS, "door": DOOR}
    if engine not in formulas[kind]:
        return Row(kind, engine, size, 0, 0, 0, 0, 0, False, "it has no formula in launcher/verify/formulas.py")
    totals, cases, message = [0, 0, 0, 0], 0, ""
    for question in own:
        for rank, found in enumerate(pool.run(question)):
            if found.kind != "findings":
                message = message or f"layout {question.layout}, documents {question.documents}: {found.message.strip()}"
            cases += rank == 0 and len(found.findings) // 2
            for name, (measured, expected) in found.findings.items():
                first = 0 if name.startswith("messages") else 2
                totals[first] += int(measured)
                totals[first + 1] += int(expected)
                if measured != expected and not message:
                    message = (
                        f"layout {question.layout}, documents {question.documents}, rank {rank}, {name}: "
                        f"{measured:g} received, {expected:g} expected"
                    )
    if not cases and not message:
        message = "nothing was counted"
    messages, messages_formula, size_received, size_formula = totals
    return Row(
        kind, engine, size, cases, messages, messages_formula, size_received, size_formula, not message, message
    )


def summarise(console: Console, rows: Sequence[Row]) -> None:
    """The table, and what differs."""
    table = Table(title="received by all ranks, forward and backward, over all cases", title_justify="left")
    for name in ("", "engine"):
        table.add_column(name)
    for name in ("ranks", "cases", "messages", "formula", "bytes", "formula"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in rows:
        numbers = (row.ranks, row.cases, row.messages, row.messages_formula, row.bytes, row.bytes_formula)
        verdict = "equal" if row.equal else "[red]differs[/red]"
        table.add_row(row.kind, row.engine, *(f"{number:,}" for number in numbers), verdict)
    console.print(table)
    for row in rows:
        if not row.equal:
            text = f"differs: {row.kind} {row.engine} on {row.ranks} ranks: {row.message}"
            console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)


def as_json(rows: Sequence[Row]) -> dict[str, object]:
    """As a document."""
    return {"equal": all(row.equal for row in rows), "engines": [asdict(row) for row in rows]}
