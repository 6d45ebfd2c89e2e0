"""Who owns which tokens: documents of a stream, and the part x document pieces held here.

Host integers only; tensors are made from them on demand, so that nothing here forces a device to synchronise.

Legend: T tokens held here, N parts held here, S segments held here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from longhaul.models.errors import UserError

R = TypeVar("R")


class Documents:
    """The documents of one stream.

    Args:
        bounds: `bounds[d] .. bounds[d + 1]` are the tokens of document `d`; starts with 0, strictly increasing, and the
            last entry is the length of the stream. `(0,)` is the empty stream.
        first_position: position, inside its document, of the stream's first token. Positive says that the first document
            began in an earlier stream: it is the only thing that lets a state flow in.
    """

    __slots__ = ("bounds", "first_position")

    def __init__(self, bounds: Sequence[int], first_position: int = 0) -> None:
        self.bounds = tuple(int(bound) for bound in bounds)
        self.first_position = int(first_position)
        if not self.bounds or self.bounds[0] != 0 or any(b <= a for a, b in zip(self.bounds, self.bounds[1:])):
            raise UserError(f"Document bounds must start with 0 and increase strictly, but are {self.bounds[:8]}.")
        if self.first_position < 0:
            raise UserError(f"first_position counts earlier tokens and cannot be {self.first_position}.")

    @property
    def num_tokens(self) -> int:
        return self.bounds[-1]

    @property
    def num_documents(self) -> int:
        return len(self.bounds) - 1

    def position(self, token: int) -> int:
        """Position of global token `token` inside its document."""
        document = bisect_right(self.bounds, token) - 1
        return token - self.bounds[document] + (self.first_position if document == 0 else 0)


class Segments:
    """The pieces (part x document) of a stream held in one place.

    Args:
        documents: the documents of the whole stream.
        parts: global token ranges `(start, stop)` held here, in chain order; a part may be empty.
    """

    def __init__(self, documents: Documents, parts: Sequence[tuple[int, int]]) -> None:
        part_bounds, bounds = [0], [0]
        part_of: list[int] = []
        document_of: list[int] = []
        position_of: list[int] = []
        enters: list[bool] = []
        cuts: list[bool] = []
        for part, (start, stop) in enumerate(parts):
            assert 0 <= start <= stop <= documents.num_tokens, f"part {part} = [{start}, {stop}) lies outside the stream"
            token, starts_here = start, []
            while token < stop:
                document = bisect_right(documents.bounds, token) - 1
                end = min(documents.bounds[document + 1], stop)
                part_of.append(part)
                document_of.append(document)
                position_of.append(documents.position(token))
                starts_here.append(position_of[-1] == 0)
                bounds.append(bounds[-1] + end - token)
                token = end
            part_bounds.append(bounds[-1])
            enters.append(not starts_here or not starts_here[0])
            cuts.append(any(starts_here))
        self.documents = documents
        self.num_tokens, self.num_parts, self.num_segments = bounds[-1], len(parts), len(part_of)
        self.part_bounds, self.bounds = tuple(part_bounds), tuple(bounds)
        self.part_of, self.document_of, self.position_of = tuple(part_of), tuple(document_of), tuple(position_of)
        self.enters, self.cuts = tuple(enters), tuple(cuts)
        self.part_starts = tuple(start for start, _ in parts)
        self._cache: dict[object, Any] = {}

    def part_lengths(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in zip(self.part_bounds, self.part_bounds[1:]))

    def segments_of_part(self, part: int) -> range:
        """Indices of the segments of one part, in order."""
        first = next((s for s, owner in enumerate(self.part_of) if owner == part), 0)
        return range(first, first + sum(owner == part for owner in self.part_of))

    def cached(self, key: object, make: Callable[[], R]) -> R:
        """A table derived from these integers, made once."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def lengths(self, device: torch.device | str = "cpu") -> Tensor:
        """Tokens of each segment, int64 [S]."""
        return torch.tensor([b - a for a, b in zip(self.bounds, self.bounds[1:])], dtype=torch.int64, device=device)

    def _per_token(self, values: Sequence[int], device: torch.device | str) -> Tensor:
        lengths = self.lengths()
        spread = torch.repeat_interleave(torch.tensor(values, dtype=torch.int64), lengths, output_size=self.num_tokens)
        return spread.to(device)

    def document_ids(self, device: torch.device | str = "cpu") -> Tensor:
        """Global document of each token, int64 [T]."""
        return self.cached(("document_ids", str(device)), lambda: self._per_token(self.document_of, device))

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """Position of each token inside its document, int64 [T]."""

        def make() -> Tensor:
            first = [position - bound for position, bound in zip(self.position_of, self.bounds)]
            return (self._per_token(first, "cpu") + torch.arange(self.num_tokens)).to(device)

        return self.cached(("positions", str(device)), make)

    def cu_seqlens(self, device: torch.device | str = "cpu") -> Tensor:
        """Local offsets of the segments, int32 [S + 1], as variable-length kernels want them."""
        return self.cached(
            ("cu_seqlens", str(device)), lambda: torch.tensor(self.bounds, dtype=torch.int32, device=device)
        )
