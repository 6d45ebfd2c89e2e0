"""JRT's two-part loss as labels and weights of a stream: restore masked tokens in a prefix, announce the next one behind it.

Made before a stream is spread over ranks, and from the sample's number alone: any number of ranks, and a run that goes on,
sees the same masks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from longhaul.models.mixers.jrt import two_part_targets
from longhaul.models.ops.segments import Documents

from .packing import Stream


@dataclass(frozen=True, kw_only=True)
class TwoPart:
    """The objective of a model that reads prefixes both ways; see `two_part_targets`.

    A stream may begin inside a document. What it begins with has a prefix of its own then, as if it were a document.
    """

    prefix_length: int
    mask_id: int
    """What stands in place of a masked token; no token of the text."""
    rate: float
    weight: float
    seed: int
    """Of the masks."""

    @property
    def fingerprint(self) -> str:
        """Names what is asked."""
        return f"two-part {self.prefix_length} {self.mask_id} {self.rate} {self.weight} {self.seed}"

    def training(self, stream: Stream, index: int) -> Stream:
        """Sample `index` with its masks."""
        # Raw draws, which NumPy promises to keep between versions; 53 bits are what a float64 holds.
        raw = np.random.PCG64(np.random.SeedSequence([self.seed, index])).random_raw(len(stream.tokens))
        return self._asked(stream, self.mask_id, torch.from_numpy((raw >> np.uint64(11)).astype(np.float64)))

    def held_out(self, stream: Stream) -> Stream:
        """A held-out stream: nothing is masked, and only what is behind prefixes counts, in nats of a next token."""
        return self._asked(stream, None, None)

    def _asked(self, stream: Stream, mask_id: int | None, draws: torch.Tensor | None) -> Stream:
        targets = two_part_targets(
            stream.tokens, Documents(stream.bounds), self.prefix_length, mask_id, self.rate, self.weight, draws,
            (stream.labels, stream.weights),
        )  # fmt: skip
        return replace(stream, tokens=targets.tokens, labels=targets.labels, weights=targets.weights, first_position=0)
