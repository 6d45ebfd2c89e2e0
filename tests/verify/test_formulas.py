"""The formulas' own shortcuts, against counting token by token."""

from __future__ import annotations

import itertools

import pytest

from longhaul.launcher.verify.formulas import Attention
from longhaul.models.ops.attention import Mask
from longhaul.models.ops.segments import Documents
from longhaul.parallel.layout import LAYOUTS, SequenceLayout


def token_by_token(case: Attention, members: list[list[int]]) -> set[tuple[int, int]]:
    owner = {}
    for holder, ranks in enumerate(members):
        for start, stop in (run for rank in ranks for run in case.layout.parts[rank]):
            owner.update(dict.fromkeys(range(start, stop), holder))
    found = set()
    for start, stop in itertools.pairwise(case.documents.bounds):
        for q, k in itertools.product(range(start, stop), repeat=2):
            late = case.mask.causal and k > q
            if not late and (case.mask.window is None or k > q - case.mask.window):
                found.add((owner[q], owner[k]))
    return found


@pytest.mark.parametrize("bounds", [(0, 23), (0, 1, 2, 9, 23), (0, 5, 6, 12, 18, 23)])
@pytest.mark.parametrize("mask", [Mask(), Mask(causal=False), Mask(window=1), Mask(window=4), Mask(window=40)])
def test_who_needs_whose_keys(bounds: tuple[int, ...], mask: Mask) -> None:
    documents = Documents(bounds)
    for name, ranks in itertools.product(LAYOUTS, (2, 3, 4)):
        layout = SequenceLayout.make(name, documents, ranks)
        case = Attention(layout, documents, mask, 4, 2, (3, 5), 0, 1)
        for members in ([[rank] for rank in range(ranks)], [[0, 1], list(range(2, ranks))]):
            assert case.needs(members) == token_by_token(case, members), (name, ranks)
