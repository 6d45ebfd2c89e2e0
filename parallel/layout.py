"""Which global tokens each rank of a sequence group holds. Integers only; no group, no tensor.

Nothing needs to be divisible, and a rank may be empty. Every rank has the same number of parts (so that one gather
serves all); in the contiguous layouts that is one, in zigzag two.
"""

from __future__ import annotations

from collections.abc import Sequence

from longhaul.models.errors import UserError
from longhaul.models.ops.chain import Link
from longhaul.models.ops.segments import Documents, Segments

Range = tuple[int, int]


class SequenceLayout:
    """Rank -> its global token ranges, in chain order.

    Args:
        parts: for each rank, its ranges `(start, stop)`; together they tile `[0, num_tokens)` exactly once.
        name: for messages.
    """

    def __init__(self, parts: Sequence[Sequence[Range]], name: str = "custom") -> None:
        self.parts = tuple(tuple((int(a), int(b)) for a, b in ranges) for ranges in parts)
        self.name = name
        ranges = sorted(
            (start, stop, rank, slot)
            for rank, own in enumerate(self.parts)
            for slot, (start, stop) in enumerate(own)
        )
        token = 0
        for start, stop, rank, _ in ranges:
            if start != token or stop < start:
                raise UserError(f"Layout {name!r} does not tile the stream: rank {rank} holds [{start}, {stop}) after {token}.")
            token = stop
        if len({len(own) for own in self.parts}) > 1:
            raise UserError(f"Layout {name!r} gives ranks different numbers of parts; pad with empty parts.")
        self.num_tokens, self.num_ranks = token, len(self.parts)
        self.num_parts = len(self.parts[0])
        self.order = tuple((rank, slot) for _, _, rank, slot in ranges)

    @classmethod
    def contiguous(
        cls, num_tokens: int, num_ranks: int, lengths: Sequence[int] | None = None
    ) -> SequenceLayout:
        """One run of tokens per rank; `lengths` (tokens of each rank) makes it uneven."""
        if lengths is None:
            lengths = [(num_tokens * (r + 1)) // num_ranks - (num_tokens * r) // num_ranks for r in range(num_ranks)]
        if len(lengths) != num_ranks or sum(lengths) != num_tokens:
            raise UserError(f"Lengths {tuple(lengths)} do not spread {num_tokens} tokens over {num_ranks} ranks.")
        starts = [sum(lengths[:rank]) for rank in range(num_ranks)]
        return cls([[(start, start + length)] for start, length in zip(starts, lengths)], "contiguous")

    def segments(self, rank: int, documents: Documents) -> Segments:
        """The parts and segments that `rank` holds."""
        self._check(documents)
        return Segments(documents, self.parts[rank])

    def chain(self, documents: Documents) -> tuple[Link, ...]:
        """All parts of the stream in order, with their owners."""
        self._check(documents)
        links = []
        for rank, slot in self.order:
            piece = Segments(documents, [self.parts[rank][slot]])
            cut = piece.cuts[0]
            tail = piece.bounds[-1] - piece.bounds[-2] if cut else piece.num_tokens
            links.append(Link(rank, slot, piece.num_tokens, tail, cut, piece.enters[0]))
        return tuple(links)

    def _check(self, documents: Documents) -> None:
        if documents.num_tokens != self.num_tokens:
            raise UserError(
                f"Layout {self.name!r} is for {self.num_tokens} tokens, but the documents hold {documents.num_tokens}."
            )

    def max_tokens(self) -> int:
        """The most tokens any rank holds."""
        return max(sum(stop - start for start, stop in own) for own in self.parts)
