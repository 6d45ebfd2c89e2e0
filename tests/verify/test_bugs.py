"""The default matrix finds every known bug, on 2 ranks and on 3."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest

from longhaul.launcher.verify.cells import Cell, Narrowing, pairwise, refusal
from longhaul.launcher.verify.ranks import Answer
from longhaul.launcher.verify.results import FAILED, PASSED, Verdict, judge
from tests.harness.pool import run_ranks

from .ranks import checked

MODEL = "language_model"
WALKS = ("ring", "ring_blocking", "all_scan")
LINEAR = ("linear_attention", "retention", "mamba2", "gla")
LONG = ("one", "spanning", "mixed")
FEW = 4  # cells of the default matrix that are run for a bug, of those that concern it


class Known(NamedTuple):
    """A bug, the cells of the default matrix that concern it, and how some tensor that must fail is called."""

    bug: str
    concerns: Callable[[Cell], bool]
    tensor: str


KNOWN = (
    Known("missing_transpose", lambda c: c.mixer in ("gated_deltanet", "kimi_delta", "rwkv7"), "gradient"),
    Known("no_boundary_term", lambda c: c.mixer == "mamba2", "gradient of A_log"),
    Known("one_head_broadcasts", lambda c: c.mixer == "mamba2_one_head", "gradient of A_log"),
    Known("halo_across_documents", lambda c: c.mixer in ("mamba2", "deltanet") and c.documents != "one", "isolation"),
    Known("decay_off_by_one", lambda c: c.mixer in ("lightning", "retention"), "output"),
    Known("leak_at_a_reset", lambda c: c.mixer in LINEAR and c.documents != "one" and c.stream != "fresh", "state"),
    Known("gradient_over_ranks", lambda c: c.mixer == MODEL, "gradient of"),
    Known("zigzag_as_contiguous", lambda c: "zigzag" in c.layout, "output"),
    Known("stale_keys", lambda c: c.mixer == "attention" and c.engine == "all_gather", "gradient"),
    Known("unsorted_bucket", lambda c: c.mixer == "mom", "output"),
    Known("label_shifted_late", lambda c: c.mixer == MODEL and c.documents in ("one", "spanning"), "loss"),
    Known("chained_bf16", lambda c: c.engine in WALKS and c.mixer in ("linear_attention", "retention", "gla"), "output"),
    Known("local_count", lambda c: c.mixer == MODEL, "loss"),
)


@functools.cache
def default_matrix() -> tuple[Cell, ...]:
    return tuple(cell for cell in pairwise(Narrowing()) if refusal(cell) is None)


def cells_of(known: Known, world_size: int) -> list[Cell]:
    """A few of the default matrix's cells that concern a bug, first those of documents that cross ranks."""
    own = [cell for cell in default_matrix() if cell.ranks == world_size and known.concerns(cell)]
    return sorted(own, key=lambda cell: (cell.dtype, cell.documents in LONG, cell.layout))[-FEW:]


def verdicts(bug: str, cells: list[Cell], world_size: int) -> list[Verdict]:
    by_rank = run_ranks(checked, world_size, bug=bug, cells=[tuple(cell) for cell in cells], timeout=120)
    return [judge(cell, [Answer(*own) for own in answers], 0.0) for cell, answers in zip(cells, zip(*by_rank))]


@pytest.mark.parametrize("world_size", (2, 3))
@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.bug)
def test_the_default_matrix_finds_a_bug(known: Known, world_size: int) -> None:
    cells = cells_of(known, world_size)
    assert cells, "the default matrix has cells that concern it"
    failed = [verdict for verdict in verdicts(known.bug, cells, world_size) if verdict.status == FAILED]
    assert failed, f"not found in {[cell.key for cell in cells]}"
    assert any(known.tensor in failure.tensor for verdict in failed for failure in verdict.failures)


@pytest.mark.parametrize("world_size", (2, 3))
def test_the_same_cells_pass_without_a_bug(world_size: int) -> None:
    cells = sorted({cell for known in KNOWN for cell in cells_of(known, world_size)})
    for verdict in verdicts("none", cells, world_size):
        assert verdict.status == PASSED, (verdict.cell.key, verdict.failures)
