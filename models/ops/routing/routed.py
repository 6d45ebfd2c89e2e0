"""A recurrence for each of E memories, run on the tokens routed to it; the others leave it as it is.

    S^m_t = A_t S^m_{t-1} + b_t   if token t goes to memory m,   else S^m_{t-1}

Memories are heads: the state is [E H, K, V], and the map of a part holds the map of each of its buckets (`buckets.py`), so
that exchanges, documents and streams treat it like any other. An empty bucket is the identity. Each of the six phases calls
the same phase of the rule on the buckets, with two corrections the rule cannot know of: where a document starts in the part
but gives a memory no token, nothing leaves that bucket (U = 0), and no cotangent enters it from the right.

Legend: T tokens, N parts, E memories, Q = N E buckets, R rows (a token has one for each memory it goes to), H heads of a
memory, K key width, V value width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..affine import AffineMap, Dense, Identity, Linear, LogScale, Scale
from ..recurrence import ChunkedRecurrence, Inputs, Recurrence, Reverse, Saved, Summary
from ..segments import Segments
from .buckets import Buckets


class Routed(ChunkedRecurrence):
    """`rule` on the rows of `buckets`: its inputs, [R, ...] each instead of [T, ...]; outputs [R, H, V]; state [E H, K, V].

    Args:
        rule: a recurrence with state [H, K, V] whose constants, if any, do not depend on the head.
    """

    def __init__(self, rule: Recurrence, buckets: Buckets) -> None:
        self.rule, self.buckets, self.needs_out = rule, buckets, rule.needs_out

    def state_shape(self, x: Inputs) -> tuple[int, ...]:
        heads, *rest = self.rule.state_shape(x)
        return (self.buckets.num_memories * heads, *rest)

    def flops_per_token(self, x: Inputs) -> int:
        return self.buckets.per_token * self.rule.flops_per_token(x)

    def step(self, x_t: Inputs, state: Tensor) -> tuple[Tensor, Tensor]:
        # The rows of one token belong to different memories, so that they are the heads of one step.
        memories = self.buckets.memories
        states = state.unflatten(0, (self.buckets.num_memories, -1))  # [E, H, K, V]
        heads = tuple(None if tensor is None else tensor.flatten(0, 1)[None] for tensor in x_t)  # [R, H, ..] -> [1, R H, ..]
        out, after = self.rule.step(heads, states[memories].flatten(0, 1))
        rows = memories.shape[0]
        return out[0].unflatten(0, (rows, -1)), states.index_copy(0, memories, after.unflatten(0, (rows, -1))).flatten(0, 1)

    def summarize(self, x: Inputs, segments: Segments) -> Summary:
        inner = self.rule.summarize(x, self.buckets.segments)
        offset = self._kept(self._by_part(inner.maps.offset))
        return Summary(AffineMap(offset, _as_heads(inner.maps.linear, self.buckets.num_memories)), inner.saved, inner)

    def local(self, x: Inputs, segments: Segments, summary: Summary) -> Tensor:
        return self.rule.local(x, self.buckets.segments, summary.scratch)

    def correct(self, out: Tensor, x: Inputs, segments: Segments, summary: Summary, S_in: Tensor) -> Tensor:
        return self.rule.correct(out, x, self.buckets.segments, summary.scratch, self._by_bucket(S_in))

    def reverse(self, x: Inputs, segments: Segments, saved: Saved, dout: Tensor) -> Reverse:
        inner = self.rule.reverse(x, self.buckets.segments, saved, dout)
        return Reverse(self._by_part(inner.C), inner)

    def local_backward(self, x: Inputs, segments: Segments, saved: Saved, dout: Tensor, S_in: Tensor, reverse: Reverse) -> Any:
        return self.rule.local_backward(x, self.buckets.segments, saved, dout, self._by_bucket(S_in), reverse.scratch)

    def correct_backward(
        self,
        x: Inputs,
        segments: Segments,
        saved: Saved,
        out: Tensor | None,
        dout: Tensor,
        S_in: Tensor,
        G_out: Tensor,
        partial: Any,
    ) -> tuple[Tensor | None, ...]:
        S_in, G_out = self._by_bucket(S_in), self._by_bucket(self._kept(G_out))
        return self.rule.correct_backward(x, self.buckets.segments, saved, out, dout, S_in, G_out, partial)

    def _by_part(self, states: Tensor) -> Tensor:
        """[Q, H, ...] -> [N, E H, ...]."""
        return states.unflatten(0, (-1, self.buckets.num_memories)).flatten(1, 2)

    def _by_bucket(self, states: Tensor) -> Tensor:
        """[N, E H, ...] -> [Q, H, ...]."""
        return states.unflatten(1, (self.buckets.num_memories, -1)).flatten(0, 1)

    def _kept(self, states: Tensor) -> Tensor:
        """States at the right end of the parts, [N, E H, ...], zero where nothing leaves the bucket."""
        lost = self.buckets.lost
        if lost is None:
            return states
        heads = states.shape[1] // self.buckets.num_memories
        return states.masked_fill(lost.repeat_interleave(heads, dim=1)[:, :, None, None], 0)


def _as_heads(linear: Linear, memories: int) -> Linear:
    """Linear parts of buckets, [Q, H, ...], as those of parts, [N, E H, ...]."""
    if isinstance(linear, Identity):
        return linear
    if isinstance(linear, (LogScale, Scale)):
        return type(linear)(linear.value.unflatten(0, (-1, memories)).flatten(1, 2))
    if isinstance(linear, Dense):
        return Dense(linear.matrix.unflatten(0, (-1, memories)).flatten(1, 2))
    # A constant decay is known from a part's length, but nobody else knows how many of its tokens a memory took.
    raise ValueError(f"A routed recurrence cannot carry maps of kind {type(linear).__name__}; give it its decays as inputs.")
