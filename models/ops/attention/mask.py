"""Which keys a query sees: masks, and the work items ("pieces") that an attention call is made of.

Host integers only. A piece is one run of queries against one run of keys. Query `i` of a piece stands at key index
`own(i) = k_stop - (q_stop - q_start) + i + gap`: with `gap = 0` the piece is aligned at the bottom right (the last
query is the last key). It sees the keys `j` of the piece with `j <= own(i)` if causal, and `j > own(i) - window` if
there is a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Mask(NamedTuple):
    """What an attention layer allows.

    Args:
        causal: a token sees itself and earlier tokens of its document only.
        window: a token sees keys at most `window - 1` tokens back; None is no limit.
    """

    causal: bool = True
    window: int | None = None


class Piece(NamedTuple):
    """Queries `q_start .. q_stop` against keys `k_start .. k_stop`.

    Args:
        causal: keys after a query's own place are hidden. False where all keys are known to be earlier.
        gap: tokens between the piece's last key and the last query's own key. Positive for a block of earlier keys;
            matters only if the piece is causal or has a window.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    causal: bool = True
    gap: int = 0

    @property
    def own(self) -> int:
        """Key index at which the first query stands."""
        return self.k_stop - (self.q_stop - self.q_start) + self.gap

    def narrowed(self, q_start: int, q_stop: int, k_start: int, k_stop: int, causal: bool) -> Piece:
        """A part of this piece in which every query keeps its own place."""
        last = self.own + (q_stop - self.q_start)
        return Piece(q_start, q_stop, k_start, k_stop, causal, last - k_stop)


def pieces_from_segments(
    bounds: Sequence[int], key_bounds: Sequence[int] | None = None, causal: bool = True
) -> list[Piece]:
    """One piece per segment, for one process that holds all keys.

    Args:
        bounds: query offsets of the segments, [S + 1].
        key_bounds: key offsets of the segments, [S + 1]; a segment's queries are the last of its keys, so that earlier
            keys (a cache) come first. Defaults to `bounds`.
    """
    keys = bounds if key_bounds is None else key_bounds
    assert len(keys) == len(bounds), "queries and keys are cut into the same segments"
    return [Piece(q0, q1, k0, k1, causal) for q0, q1, k0, k1 in zip(bounds[:-1], bounds[1:], keys[:-1], keys[1:])]


def trim(piece: Piece, window: int | None) -> Piece | None:
    """`piece` without the keys that nobody sees and the queries that see nothing; None if nothing is left.

    The result is causal only if some query must be kept from some key.
    """
    if window is not None and window < 1:
        raise ValueError(f"A window counts the token itself and must be at least 1, but is {window}.")
    q_start, q_stop, k_start, k_stop, causal, _ = piece
    shift = piece.own - q_start  # query q stands at key q + shift
    if causal:
        q_start = max(q_start, k_start - shift)
        k_stop = min(k_stop, q_stop + shift)
    if window is not None:
        q_stop = min(q_stop, k_stop + window - 1 - shift)
        k_start = max(k_start, q_start + shift - window + 1)
        if causal:
            k_stop = min(k_stop, q_stop + shift)
    if q_start >= q_stop or k_start >= k_stop:
        return None
    return piece.narrowed(q_start, q_stop, k_start, k_stop, causal and q_start + shift < k_stop - 1)


def binding_window(piece: Piece, window: int | None) -> int | None:
    """`window` if it hides any key of a trimmed piece, else None."""
    last = piece.own + piece.q_stop - piece.q_start - 1
    return window if window is not None and last - window + 1 > piece.k_start else None


def simple_blocks(piece: Piece) -> Iterator[Piece]:
    """Cut a trimmed piece without window into full rectangles and causal squares (first query = first key).

    Kernels that align a causal mask at the top left, or at the bottom right, agree on these.
    """
    if not piece.causal:
        yield piece
        return
    q_start, q_stop, k_start, k_stop, _, _ = piece
    shift = piece.own - q_start
    sees_all = max(q_start, k_stop - shift)  # queries from here on see every key
    if sees_all < q_stop:
        yield piece.narrowed(sees_all, q_stop, k_start, k_stop, causal=False)
    diagonal = q_start + shift
    if k_start < diagonal:
        yield piece.narrowed(q_start, sees_all, k_start, diagonal, causal=False)
    yield piece.narrowed(q_start, sees_all, diagonal, k_stop, causal=True)
