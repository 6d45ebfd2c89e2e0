"""The awkward streams and layouts of the matrix, by name.

Legend: T tokens of the stream, P ranks.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from longhaul.models.ops.segments import Documents
from longhaul.parallel.layout import LAYOUTS, SequenceLayout

NUM_TOKENS = 37  # odd, and several chunks of 8
EARLIER = 5  # tokens of the first document that an earlier stream held, where a stream is continued

DOCUMENTS = {
    "one": "a single document",
    "many_short": "1 to 3 tokens each, shorter than the reach of a convolution",
    "edge": "a document starts at every edge of the even layout on 2, 3 and 4 ranks",
    "spanning": "one document covers whole ranks and goes on at both sides",
    "mixed": "short ones, a long one, a single token at the end",
}

# What flows in and out: (first position of the stream's first token, whether the state after the stream is wanted).
STREAMS = {"fresh": (0, False), "kept": (0, True), "continued": (EARLIER, True)}

UNEVEN = {
    "uneven": "all shares different, one rank has a single token",
    "empty_first": "the first rank has nothing",
    "empty_middle": "a middle rank has nothing",
    "empty_last": "the last rank has nothing",
}

WIDE = "striped_wide"
STRIPE = 3  # tokens of a stripe, where it is not the layout's own choice (here a single one)


def documents(table: str, stream: str) -> Documents:
    """The stream of a cell."""
    starts = {
        "one": [],
        "many_short": list(accumulate([2, 1, 3, 1, 1, 2, 3, 3] * NUM_TOKENS)),
        "edge": [NUM_TOKENS * rank // ranks for ranks in (2, 3, 4) for rank in range(1, ranks)],
        "spanning": [NUM_TOKENS // 8, NUM_TOKENS - NUM_TOKENS // 8],
        "mixed": [1, 3, 6, NUM_TOKENS // 5, 4 * NUM_TOKENS // 5, NUM_TOKENS - 3, NUM_TOKENS - 1],
    }[table]
    bounds = (0, *sorted({start for start in starts if 0 < start < NUM_TOKENS}), NUM_TOKENS)
    return Documents(bounds, STREAMS[stream][0])


def layout_names() -> list[str]:
    """All registered layouts, contiguous ones of awkward shares, and wide stripes."""
    return [*LAYOUTS, *UNEVEN, WIDE]


def layout_of(name: str, ranks: int) -> tuple[str, dict[str, Any]] | None:
    """The registered layout and its options, or None where that many ranks cannot have it."""
    if name == WIDE:
        return "striped", {"block": STRIPE}
    if name not in UNEVEN:
        return name, {}
    if ranks < (3 if name == "empty_middle" else 2):
        return None
    everyone = range(ranks)
    if name == "uneven":
        single = ranks // 2
        lengths = _share(NUM_TOKENS - 1, [0 if rank == single else 3 + 2 * rank for rank in everyone])
        lengths[single] = 1
    else:
        nobody = {"empty_first": 0, "empty_middle": ranks // 2, "empty_last": ranks - 1}[name]
        lengths = _share(NUM_TOKENS, [0 if rank == nobody else 1 for rank in everyone])
    return "contiguous", {"lengths": tuple(lengths)}


def _share(tokens: int, weights: list[int]) -> list[int]:
    """Split a length by integer weights; what is left over goes to the first that have a weight."""
    lengths = [tokens * weight // sum(weights) for weight in weights]
    takers = [rank for rank, weight in enumerate(weights) if weight]
    for rank in takers[: tokens - sum(lengths)]:
        lengths[rank] += 1
    return lengths


def make_layout(name: str, stream: Documents, ranks: int) -> SequenceLayout:
    """The layout of a cell."""
    found = layout_of(name, ranks)
    assert found is not None, f"{name} on {ranks} ranks is no cell"
    return SequenceLayout.make(found[0], stream, ranks, **found[1])
