"""The door: a mixer's only window on the rest of the sequence.

A `SequenceShard` is the part of a packed stream that is held here. Models are written against it and never learn whether
the rest of the stream lies in this process. `WholeSequence` is the case in which it does, and the reference meaning.

Gradient convention: the objective is the sum of all holders' local losses. A *state* (what goes into a door call as
`state` and comes out as the second result) is replicated: every holder has the same value and the same, whole, cotangent.

Legend: T tokens held here, N parts held here, H heads, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .ops.attention import Mask, Piece, attention
from .ops.recurrence import Recurrence
from .ops.segments import Documents, Segments

Element = Any  # a tensor, or a tuple of tensors


class KVState(NamedTuple):
    """Keys and values of the last document so far (its last `window - 1` tokens under a window), [tokens, Hkv, K]."""

    k: Tensor
    v: Tensor


class Monoid(Protocol):
    """An associative merge of small fixed-size elements (pools, tails, counts), traceable by autograd."""

    def empty(self, like: Element) -> Element:
        """The element that changes nothing, shaped like `like`."""
        ...

    def combine(self, earlier: Element, later: Element) -> Element: ...


class SequenceShard:
    """The part of a stream held here. Plain, made per micro-batch, never written to.

    Attributes:
        segments: the tokens held here, cut into parts and documents.
        keep_state: the stream goes on after this one, so door calls return the state after its last token; else None.
    """

    def __init__(self, segments: Segments, device: torch.device | str = "cpu", keep_state: bool = False) -> None:
        self.segments = segments
        self.device = torch.device(device)
        self.keep_state = keep_state

    @property
    def documents(self) -> Documents:
        return self.segments.documents

    @property
    def num_tokens(self) -> int:
        return self.segments.num_tokens

    @property
    def positions(self) -> Tensor:
        """Position of each token inside its document, int64 [T]."""
        return self.segments.positions(self.device)

    @property
    def document_ids(self) -> Tensor:
        """Which document of the stream each token belongs to, int64 [T]."""
        return self.segments.document_ids(self.device)

    @property
    def document_lengths(self) -> Tensor:
        """Tokens of each document of the stream, int64 [num_documents]."""
        bounds = self.documents.bounds
        return torch.tensor([stop - start for start, stop in zip(bounds, bounds[1:])], device=self.device)

    def document_weights(self, weights: Tensor) -> Tensor:
        """How much of each document's weight in the loss is counted here, [T] -> [num_documents]: over ranks, all of it."""
        return token_sums(self.share(weights), "document", self.share(self.document_ids), self.documents.num_documents)

    def scan(self, op: Recurrence, x: Sequence[Tensor | None], state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """A linear recurrence over the whole sequence.

        Args:
            x: the op's inputs, [T, ...] each.
            state: the state before the stream's first token, [*state_shape]; read only if its document began earlier.

        Returns:
            Outputs [T, ...], and the state after the stream's last token if `keep_state`.
        """
        raise NotImplementedError

    def halo(self, x: Tensor, width: int, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The `width` tokens before each part.

        Args:
            x: [T, ...].
            state: the `width` tokens before the stream, [width, ...].

        Returns:
            Left context [N, width, ...], zero before the start of the document that is open there, and the stream's own
            last `width` tokens (zero before its last document's start) if `keep_state`.
        """
        raise NotImplementedError

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask = Mask(), state: KVState | None = None, scale: float | None = None
    ) -> tuple[Tensor, KVState | None]:
        """Softmax attention inside each document over the whole sequence.

        Args:
            q: [T, H, K]. k: [T, Hkv, K]. v: [T, Hkv, V]; H is a multiple of Hkv.
            scale: of the scores; `K ** -0.5` if None.

        Returns:
            [T, H, V], and the keys and values a continuation needs if `keep_state`.
        """
        raise NotImplementedError

    def prefix(self, monoid: Monoid, element: Element, state: Element | None = None) -> tuple[Element, Element | None]:
        """What came before each part, under an associative merge.

        Args:
            element: per part, what the part's *last document* contributes, [N, ...] (a tensor or a tuple of them).
            state: what came before the stream, [...].

        Returns:
            What came before each part in the document open there [N, ...], and what a continuation needs if `keep_state`.
        """
        raise NotImplementedError

    def total(self, x: Tensor, per: str = "sequence") -> Tensor:
        """The sum of `x` [T, ...] over all tokens of the stream, [...], or of each document, [num_documents, ...]."""
        raise NotImplementedError

    # Heads. Between layers this shard answers for its *share* of the tokens; inside a layer for all T tokens and its own heads.
    # Who owns all heads answers for all tokens.

    def share(self, x: Tensor) -> Tensor:
        """The rows this shard answers for between layers, of a tensor alike on all owners of heads: [T, ...] -> [T', ...]."""
        return x

    def to_heads(self, x: Tensor) -> Tensor:
        """All tokens, for the heads owned here: [T', ...] -> [T, ...]."""
        return x

    def from_heads(self, x: Tensor) -> Tensor:
        """The sum over all owners of heads, back to the tokens answered for: [T, ...] -> [T', ...]."""
        return x

    def head_sum(self, x: Tensor) -> Tensor:
        """The sum over all owners of heads, on each of them: [...] -> [...]."""
        return x

    def document_sum(self, x: Tensor) -> Tensor:
        """The whole document's sum, for bidirectional layers: one total instead of a prefix.

        Args:
            x: what each segment adds to its document, [S, ...].

        Returns:
            For each segment, the sum over all segments of its document, wherever they are held, [S, ...].
        """
        raise NotImplementedError


class WholeSequence(SequenceShard):
    """The whole stream in one process."""

    def __init__(
        self, documents: Documents, device: torch.device | str = "cpu", keep_state: bool = False
    ) -> None:
        super().__init__(Segments(documents, [(0, documents.num_tokens)]), device, keep_state)

    def scan(self, op: Recurrence, x: Sequence[Tensor | None], state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if self.num_tokens == 1 and self.keep_state and not torch.is_grad_enabled():
            entering = op.zero_state(tuple(x), self.segments)[0] if state is None or not self._enters else state
            return op.step(tuple(x), entering)
        out, final = op.run(tuple(x), self.segments, None if state is None else state[None])
        return out, final[0] if self.keep_state else None

    @property
    def _enters(self) -> bool:
        return self.segments.enters[0]

    def halo(self, x: Tensor, width: int, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        context = x.new_zeros(width, *x.shape[1:]) if state is None or not self._enters else state
        tail = None
        if self.keep_state:
            tail = torch.cat([context, x])[x.shape[0] :]
            open_tokens = self.documents.position(self.num_tokens - 1) + 1 if self.num_tokens else width
            tail = zero_before(tail, width - open_tokens)
        return context[None], tail

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask = Mask(), state: KVState | None = None, scale: float | None = None
    ) -> tuple[Tensor, KVState | None]:
        before = 0
        if state is not None and self._enters:
            before = state.k.shape[0]
            alone = self.num_tokens == 1 and self.keep_state and not torch.is_grad_enabled()
            k, v = (_appended(old, new) if alone else torch.cat([old, new]) for old, new in zip(state, (k, v)))
        pieces, bounds = [], self.segments.bounds
        for segment, (start, stop) in enumerate(zip(bounds, bounds[1:])):
            enters = self.segments.position_of[segment] > 0
            pieces.append(Piece(start, stop, 0 if enters else before + start, before + stop, mask.causal))
        out, _ = attention(q, k, v, pieces, scale if scale is not None else q.shape[-1] ** -0.5, mask.window)
        if not self.keep_state:
            return out, None
        open_from = pieces[-1].k_start if pieces else 0
        if mask.window is not None:
            open_from = max(open_from, k.shape[0] - (mask.window - 1))
        return out, KVState(k[open_from:], v[open_from:])

    def prefix(self, monoid: Monoid, element: Element, state: Element | None = None) -> tuple[Element, Element | None]:
        own = map_element(lambda tensor: tensor[0], element)
        before = monoid.empty(own) if state is None or not self._enters else state
        after = None
        if self.keep_state:
            after = own if self.segments.cuts[0] else monoid.combine(before, own)
        return map_element(lambda tensor: tensor[None], before), after

    def total(self, x: Tensor, per: str = "sequence") -> Tensor:
        return token_sums(x, per, self.document_ids, self.documents.num_documents)

    def document_sum(self, x: Tensor) -> Tensor:
        return x  # one part, so a document is one segment


def _appended(earlier: Tensor, row: Tensor) -> Tensor:
    """`earlier` [n, ...] and one `row` [1, ...] more, where possible in the memory behind `earlier`.

    Keys and values of a long text would otherwise be copied for every token made. Memory grows by doubling, and notes how many
    rows are taken, so that who goes on twice from one state has a copy the second time.
    """
    buffer, rows = earlier._base, earlier.shape[0]
    stop = earlier.storage_offset() // max(1, earlier.stride(0)) + rows
    room = (
        buffer is not None
        and getattr(buffer, "rows_taken", None) == stop
        and stop < buffer.shape[0]
        and (buffer.dtype, buffer.device) == (row.dtype, row.device)
    )
    if not room:
        buffer, stop = torch.empty(2 * rows + 64, *row.shape[1:], dtype=row.dtype, device=row.device), rows
        buffer[:rows] = earlier
    assert buffer is not None
    buffer[stop : stop + 1] = row
    buffer.rows_taken = stop + 1  # type: ignore[attr-defined]
    return buffer[stop - rows : stop + 1]


def map_element(function: Any, element: Element) -> Element:
    """Apply to a tensor, or to each tensor of a (named) tuple."""
    if isinstance(element, Tensor):
        return function(element)
    parts = [function(tensor) for tensor in element]
    return type(element)(*parts) if hasattr(element, "_fields") else tuple(parts)


def zero_before(rows: Tensor, first: int) -> Tensor:
    """`rows` [width, ...] with rows before `first` zero (out of place)."""
    if first <= 0:
        return rows
    return torch.cat([torch.zeros_like(rows[:first]), rows[first:]])


def token_sums(x: Tensor, per: str, document_ids: Tensor, num_documents: int) -> Tensor:
    """Sums of `x` [T, ...] over the tokens held here: [...], or per document [num_documents, ...]."""
    if per == "sequence":
        return x.sum(0)
    assert per == "document", f"total is per sequence or per document, not per {per!r}"
    return x.new_zeros(num_documents, *x.shape[1:]).index_add(0, document_ids, x)
