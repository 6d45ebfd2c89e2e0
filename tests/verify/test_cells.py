"""The matrix itself: what it covers, what is refused, and how verdicts are reached and kept."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest

from longhaul.launcher.verify.cells import (
    ATTENTION_NAMES,
    AXES,
    DEFAULT_RANKS,
    EXCHANGE_NAMES,
    MANY_RANKS,
    RANKS,
    VARIANTS,
    Cell,
    Narrowing,
    exists,
    pairwise,
    refusal,
    spaces,
    whole,
)
from longhaul.launcher.verify.ranks import Answer
from longhaul.launcher.verify.results import FAILED, PASSED, REFUSED, ResultsFile, Verdict, judge
from longhaul.launcher.verify.subjects import names, subject
from longhaul.launcher.verify.tables import DOCUMENTS, NUM_TOKENS, documents, layout_names, make_layout
from longhaul.models.mixers.registry import MIXERS
from longhaul.parallel.attention.registry import ENGINES
from longhaul.parallel.exchange.registry import EXCHANGES
from longhaul.parallel.layout import LAYOUTS

CELL = Cell("mamba2", "ring", "zigzag", "mixed", "fresh", "fp64", 2)


def test_every_pair_that_is_served_is_covered() -> None:
    cells = [cell for cell in pairwise(Narrowing(ranks=(3,))) if refusal(cell) is None]
    covered = {pair for cell in cells for pair in itertools.combinations(enumerate(cell), 2)}
    assert set(names()) == {cell.mixer for cell in cells} and set(MIXERS) <= set(names())
    assert {*EXCHANGES, *ENGINES, *VARIANTS} == {cell.engine for cell in cells}
    assert {*LAYOUTS, *layout_names()} == {cell.layout for cell in cells}
    for axes in spaces(Narrowing(), (3,)):
        for (i, a), (j, b) in itertools.combinations(enumerate(AXES), 2):
            for x, y in itertools.product(axes[a], axes[b]):
                if ((i, x), (j, y)) in covered:
                    continue
                # Nothing serves it: no cell of the product with both exists and is not refused.
                narrowed = {**axes, a: [x], b: [y]}
                rest = itertools.product(*(narrowed[axis] for axis in AXES))
                assert not any(exists(cell) and refusal(cell) is None for cell in map(Cell._make, rest)), (x, y)


def test_the_default_matrix_is_small_and_the_whole_one_has_it_all() -> None:
    few, everything = pairwise(Narrowing()), whole(Narrowing())
    assert len(few) < 900 and {cell.ranks for cell in few} == set(DEFAULT_RANKS)
    assert {cell.ranks for cell in everything} == {*RANKS, *MANY_RANKS}
    product = {cell._replace(stream="") for cell in everything}
    assert {cell._replace(stream="") for cell in few if refusal(cell) is None} <= product


def test_refusals_are_these() -> None:
    refused = {}
    for mixer, engine, layout in itertools.product(names(), {*EXCHANGE_NAMES, *ATTENTION_NAMES}, layout_names()):
        fits = engine in (EXCHANGE_NAMES if subject(mixer).recurrent else ATTENTION_NAMES)
        cell = Cell(mixer, engine, layout, "one", "fresh", "fp64", 4)
        if fits and exists(cell) and refusal(cell) is not None:
            refused[engine, layout, mixer if not subject(mixer).recurrent else "recurrent"] = refusal(cell)
    many_parts = ("zigzag", "striped", "striped_wide", "contiguous_per_document", "zigzag_per_document")
    expected = {(engine, layout, "recurrent") for engine in EXCHANGE_NAMES for layout in ("striped", "striped_wide")}
    expected |= {(engine, layout, "recurrent") for engine in ("hierarchical", "hierarchical_log") for layout in many_parts}
    expected |= {("rsa", layout, "attention_window") for layout in layout_names()}
    assert set(refused) == expected


@pytest.mark.parametrize("ranks", (1, 2, 3, 4, 8))
def test_awkward_layouts_are_what_they_say(ranks: int) -> None:
    for layout, table in itertools.product(layout_names(), DOCUMENTS):
        if exists(CELL._replace(layout=layout, ranks=ranks)):
            shares = [make_layout(layout, documents(table, "fresh"), ranks).tokens_of(rank) for rank in range(ranks)]
            assert sum(shares) == NUM_TOKENS and (0 in shares) == layout.startswith("empty")
            assert layout != "uneven" or 1 in shares


def test_judging() -> None:
    good = Answer("findings", {"output": (1e-12, 1e-10), "isolation": (0.0, 0.0)})
    assert judge(CELL, [good, good], 0.0).status == PASSED
    for name, value in (("output", 1e-9), ("output", math.nan), ("isolation", 1e-300)):
        bad = Answer("findings", {**good.findings, name: (value, good.findings[name][1])})
        verdict = judge(CELL, [good, bad], 0.0)
        assert verdict.status == FAILED and (verdict.failures[0].tensor, verdict.failures[0].rank) == (name, 1)
    assert judge(CELL, [Answer("refused", {}, "no")] * 2, 0.0).status == REFUSED
    assert judge(CELL, [Answer("refused", {}, "no"), good], 0.0).status == FAILED
    assert judge(CELL, [Answer("error", {}, "broke"), good], 0.0).status == FAILED
    assert judge(CELL, [Answer("findings", {})] * 2, 0.0).status == FAILED, "a cell that compares nothing proves nothing"


def test_results_are_kept_for_the_program_that_made_them(tmp_path: Path) -> None:
    kept, other = ResultsFile(tmp_path / "deep" / "kept.jsonl"), CELL._replace(ranks=3)
    assert kept.read() == {}
    kept.append(Verdict(CELL, PASSED, 0.5, 1e-15))
    kept.append(Verdict(other, FAILED, 0.5, math.inf))
    assert kept.read() == {CELL: Verdict(CELL, PASSED, 0.5, 1e-15)}, "what failed is run again"
    assert ResultsFile(kept.path, fingerprint="another program").read() == {}
