"""The matrix: cells, the whole product, and a small set of them in which every pair of values meets.

Legend: P ranks.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from longhaul.models.errors import UserError
from longhaul.models.ops.segments import Documents
from longhaul.parallel.attention.registry import ENGINES
from longhaul.parallel.comm import Comm
from longhaul.parallel.engine import SequenceParallel
from longhaul.parallel.exchange.registry import EXCHANGES

from . import tables
from .subjects import MODEL, ONE_HEAD, WIDE_ONLY, names, subject

DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
TOLERANCE = {"fp64": 1e-10, "fp32": 1e-5}
RANKS = (1, 2, 3, 4)
DEFAULT_RANKS = (2, 3)
ATTEMPTS = 30  # at each cell of a covering; more make it hardly smaller
BLOCKS = 3  # of all_scan: small states would travel whole
# Options that change how an engine computes, as engines of their own; what changes results (a payload in bfloat16, a reach that
# is cut) is within no tolerance here and is left to tests of its bounds.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "hierarchical_log": ("hierarchical", {"inside": "log_scan", "across": "ring"}),
    "all_gather_sliced": ("all_gather", {"head_slices": 2}),
    "ring_kv": ("ring", {"backward": "kv"}),
    "ring_q": ("ring", {"backward": "q"}),
}
EXCHANGE_NAMES = (*EXCHANGES, "hierarchical_log")
ATTENTION_NAMES = (*ENGINES, "all_gather_sliced", "ring_kv", "ring_q")
# Ranks beyond: only a covering of pairs, also in the whole matrix (as it is of the variations).
MANY_RANKS = (6, 8)


class Cell(NamedTuple):
    """One case.

    Attributes:
        engine: the exchange of a mixer with a recurrence, the attention engine of one without.
        layout, documents, stream: names of `tables`.
    """

    mixer: str
    engine: str
    layout: str
    documents: str
    stream: str
    dtype: str
    ranks: int

    @property
    def key(self) -> str:
        """As the results file and messages name it."""
        return "/".join(map(str, self))

    @property
    def reference(self) -> tuple[str, ...]:
        """Cells alike in this share what they are compared with."""
        return self.mixer, self.dtype, self.documents, self.stream


AXES = Cell._fields


def inner_size(ranks: int) -> int:
    """Ranks of a group inside, for engines of two levels: the smallest divisor, or none where P is an odd prime."""
    if ranks <= 2:
        return ranks
    return next((size for size in range(2, ranks) if ranks % size == 0), 1)


def engine_of(cell: Cell, comm: Comm, inner: Comm, outer: Comm) -> SequenceParallel:
    """The engines of a cell, plugged in.

    Raises:
        UserError: they cannot serve it.
    """
    needed = subject(cell.mixer)
    found = tables.layout_of(cell.layout, cell.ranks)
    if found is None:
        raise UserError(f"Layout {cell.layout!r} does not exist on {cell.ranks} ranks.")
    name, options = VARIANTS.get(cell.engine, (cell.engine, {"blocks": BLOCKS} if cell.engine == "all_scan" else {}))
    exchange, attention = (name, "all_gather") if needed.recurrent else ("all_gather", name)
    for_exchange, for_attention = (options, {}) if needed.recurrent else ({}, options)
    engine = SequenceParallel(
        comm,
        exchange,
        attention,
        found[0],
        exchange_options={**({"intra": inner, "inter": outer} if exchange == "hierarchical" else {}), **for_exchange},
        attention_options={**({"inner": inner, "outer": outer} if attention == "usp" else {}), **for_attention},
        layout_options=found[1],
    )
    engine.check(needed.recurrent, needed.masks)
    return engine


@cache
def _refusal(mixer: str, engine: str, layout: str, ranks: int) -> str | None:
    size = inner_size(ranks)
    groups = [Comm(None) for _ in range(3)]
    for group, group_size in zip(groups, (ranks, size, ranks // size)):
        group.size = group_size  # of the right size, for nobody sends anything here
    try:
        engine_of(Cell(mixer, engine, layout, "one", "fresh", "fp64", ranks), *groups)
    except UserError as error:
        return str(error)
    return None


def refusal(cell: Cell) -> str | None:
    """Why the engine of a cell refuses it before the first step, or None."""
    return _refusal(cell.mixer, cell.engine, cell.layout, cell.ranks)


def exists(cell: Cell) -> bool:
    """Whether a cell means anything."""
    if tables.layout_of(cell.layout, cell.ranks) is None:
        return False
    if cell.mixer in WIDE_ONLY and cell.dtype != "fp64":
        return False
    needed = subject(cell.mixer)
    if not needed.stateful and cell.stream != "fresh":
        return False
    if not needed.recurrent and not needed.masks and cell.engine != "all_gather":
        return False  # it asks no engine: its sums over documents are the same under all of them
    if cell.ranks == 1 and (cell.mixer == MODEL or cell.layout != "contiguous"):
        return False  # one rank holds the stream whatever the layout
    return cell.mixer != MODEL or cell.stream == "fresh"  # a step is given no state to compare


class Narrowing(NamedTuple):
    """What the user asked for, by axis; an empty tuple is everything."""

    mixer: tuple[str, ...] = ()
    engine: tuple[str, ...] = ()
    layout: tuple[str, ...] = ()
    documents: tuple[str, ...] = ()
    stream: tuple[str, ...] = ()
    dtype: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()


def spaces(
    narrowing: Narrowing, ranks: Sequence[int], variations: bool = True
) -> list[dict[str, list[str] | list[int]]]:
    """Values by axis: one product for mixers with a recurrence, one for those without, one for the language model.

    Mixers without state stand apart, since their streams are all fresh.

    Args:
        variations: on axes that are not narrowed, with variants of engines, wide stripes and mixers of one head too.
    """
    mixers = list(narrowing.mixer) or [name for name in names() if variations or name not in ONE_HEAD]
    # Encoders' mixers need no exchange, or they would be recurrent.
    groups = {
        "recurrent": [name for name in mixers if name != MODEL and subject(name).recurrent],
        "softmax": [name for name in mixers if name != MODEL and not subject(name).recurrent and subject(name).stateful],
        "encoder": [name for name in mixers if not subject(name).stateful],
        "model": [name for name in mixers if name == MODEL],
    }
    found = []
    for kind, members in groups.items():
        engines = list(ATTENTION_NAMES if kind in ("softmax", "encoder") else EXCHANGE_NAMES)
        axes: dict[str, list[str] | list[int]] = {
            "mixer": members,
            "engine": engines,
            "layout": tables.layout_names(),
            "documents": list(tables.DOCUMENTS),
            "stream": list(tables.STREAMS) if kind in ("recurrent", "softmax") else ["fresh"],
            "dtype": list(DTYPES),
            "ranks": list(ranks),
        }
        for axis in AXES[1:]:
            chosen = getattr(narrowing, axis)
            if not variations and not chosen and axis in ("engine", "layout"):
                axes[axis] = [value for value in axes[axis] if value not in VARIANTS and value != tables.WIDE]  # type: ignore[assignment]
            if chosen:
                axes[axis] = list(chosen) if axis == "ranks" else [value for value in axes[axis] if value in chosen]  # type: ignore[assignment]
        if all(axes.values()):
            found.append(axes)
    return found


def whole(narrowing: Narrowing) -> list[Cell]:
    """The product, and a covering in which variations of engines, layouts and mixers take part.

    What flows in and out goes round from cell to cell instead of multiplying the product.
    """
    cells: list[Cell] = []
    for axes in spaces(narrowing, narrowing.ranks or RANKS, variations=False):
        streams = axes.pop("stream")
        for count, values in enumerate(itertools.product(*axes.values())):
            mixer, engine, layout, documents, dtype, ranks = values
            # A step that shares no factor with the lengths of other axes, so that all combinations of two turn up.
            stream = streams[(count + count // 7) % len(streams)]
            cell = Cell(mixer, engine, layout, documents, stream, dtype, ranks)  # type: ignore[arg-type]
            if exists(cell):
                cells.append(cell)
    cells += pairwise(narrowing, (*RANKS, *MANY_RANKS))
    return ordered(cells)


def pairwise(narrowing: Narrowing, ranks: Sequence[int] = DEFAULT_RANKS) -> list[Cell]:
    """Few cells in which, on each number of ranks, any two values that some served cell has together meet.

    And one cell for every refusal.
    """
    cells: list[Cell] = []
    for size in narrowing.ranks or ranks:
        for axes in spaces(narrowing, (size,)):
            cells += _cover(axes, size)
    refused = {refusal(cell): cell for cell in reversed(cells)}
    return ordered(cell for cell in cells if refusal(cell) is None or refused[refusal(cell)] == cell)


def ordered(cells: Iterable[Cell]) -> list[Cell]:
    """World size by world size, and then so that neighbours share their reference."""
    return sorted(set(cells), key=lambda cell: (cell.ranks, cell.mixer, cell.dtype, cell.documents, cell.stream, cell))


Pair = tuple[int, object, int, object]


def _pairs(values: Sequence[object]) -> Iterator[Pair]:
    for (i, a), (j, b) in itertools.combinations(enumerate(values), 2):
        yield i, a, j, b


def _served(cell: Cell) -> bool:
    return exists(cell) and refusal(cell) is None


def _cover(axes: Mapping[str, Sequence[object]], seed: int) -> list[Cell]:
    """A greedy covering of pairs, the same at every call."""
    draw = random.Random(seed)
    columns = [list(axes[axis]) for axis in AXES]
    missing: dict[Pair, None] = {}
    refused: dict[str, Cell] = {}
    # Whether a cell is served depends on mixer, engine, layout and ranks only.
    for i, j in itertools.combinations(range(len(AXES)), 2):
        for a, b in itertools.product(columns[i], columns[j]):
            missing[i, a, j, b] = None
    for mixer, engine, layout, ranks in itertools.product(*(axes[axis] for axis in ("mixer", "engine", "layout", "ranks"))):
        rest = columns[3][0], columns[4][0], columns[5][0]
        cell = Cell(mixer, engine, layout, *rest, ranks)  # type: ignore[arg-type]
        reason = refusal(cell) if exists(cell) else None
        if reason is not None:
            refused.setdefault(reason, cell)
    cells: list[Cell] = []
    while missing:
        pair = next(iter(missing))
        best: tuple[int, Cell] | None = None
        for attempt in range(ATTEMPTS):
            values = [draw.choice(column) for column in columns]
            values[pair[0]], values[pair[2]] = pair[1], pair[3]
            if attempt % 2:
                values = _climb(values, columns, pair, missing)
            cell = Cell(*values)  # type: ignore[arg-type]
            if _served(cell):
                gain = sum(other in missing for other in _pairs(cell))
                if best is None or gain > best[0]:
                    best = gain, cell
        found = best[1] if best is not None else _any_with(pair, columns)
        if found is None:
            del missing[pair]  # no served cell has both
            continue
        cells.append(found)
        for other in _pairs(found):
            missing.pop(other, None)
    return cells + list(refused.values())


def _any_with(pair: Pair, columns: list[list[object]]) -> Cell | None:
    """Some served cell with both values."""
    fixed = {pair[0]: pair[1], pair[2]: pair[3]}
    product = itertools.product(*([fixed[axis]] if axis in fixed else column for axis, column in enumerate(columns)))
    return next((cell for cell in map(Cell._make, product) if _served(cell)), None)


def _climb(values: list[object], columns: list[list[object]], fixed: Pair, missing: dict[Pair, None]) -> list[object]:
    """Axis by axis, the value that adds most missing pairs."""
    for axis in range(len(columns)):
        if axis in (fixed[0], fixed[2]):
            continue

        def gain(value: object, axis: int = axis) -> int:
            own = [(i, a, axis, value) if i < axis else (axis, value, i, a) for i, a in enumerate(values) if i != axis]
            return sum(pair in missing for pair in own)

        values[axis] = max(columns[axis], key=gain)
    return values


def check_names(narrowing: Narrowing, own_module: bool) -> None:
    """Refuse values that no axis has."""
    known: dict[str, Sequence[str]] = {
        "mixer": names(),
        "engine": [*dict.fromkeys((*EXCHANGE_NAMES, *ATTENTION_NAMES))],
        "layout": tables.layout_names(),
        "documents": list(tables.DOCUMENTS),
        "stream": list(tables.STREAMS),
        "dtype": list(DTYPES),
    }
    for axis, values in known.items():
        if axis == "mixer" and own_module:
            continue
        for value in getattr(narrowing, axis):
            if value not in values:
                raise UserError(f"--{axis} {value!r} is not known: choose from {', '.join(values)}.")
    for ranks in narrowing.ranks:
        if not 1 <= ranks <= 64:
            raise UserError(f"--ranks {ranks} must lie between 1 and 64.")


def stream_of(cell: Cell) -> Documents:
    """The documents of a cell."""
    return tables.documents(cell.documents, cell.stream)
