"""Training on a stream that does not fit in memory: the same prefix of maps, over time instead of ranks.

The stream is cut into chunks of consecutive tokens. A first pass without gradients runs all layers over one chunk after
another and keeps only the states at the chunks' borders. Then, from the last chunk to the first, a chunk's forward is run
again from its border state, now with gradients, and

    backward([loss_c, *S_out], [1, *dS_out])  ->  parameters' gradients, dS_in

where dS_out is the gradient the next chunk handed back. Gradients are those of the whole stream, for every mixer whose
state is explicit: recurrent states, convolution tails, and the keys and values of softmax attention.

This is a driver around a model, not a shard: each chunk is a stream of its own, whose first document may have begun
earlier, so a chunk may be spread over ranks. States and their gradients are replicated there, as everywhere.

Legend: T tokens of the stream, C tokens of a chunk, n chunks.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from .bidirectional import BidirectionalMixer
from .borders import KEEP, Borders
from .config import PREFIX_MIXERS
from .errors import UserError
from .mixers.registry import MIXERS
from .ops.segments import Documents
from .sequence import SequenceShard
from .whole_documents import DocumentTotals

Model = Callable[..., Any]
MakeShard = Callable[[Documents, bool], SequenceShard]
"""A chunk's documents and `keep_state` -> the part of the chunk that is held here."""


class Chunk(NamedTuple):
    """Tokens `start .. stop` of the stream; `goes_on` says that the token after them belongs to the same document."""

    start: int
    stop: int
    documents: Documents
    goes_on: bool


class LongStream(NamedTuple):
    """A whole stream, tokens, labels and weights [T] each, alike on every rank of a sequence group."""

    tokens: Tensor
    labels: Tensor
    weights: Tensor
    documents: Documents


class Streamed(NamedTuple):
    """Of a streamed step; everything detached.

    Attributes:
        loss_sum, weight_sum: over the tokens held here, float64; auxiliary losses are not in it.
        state: after the stream's last token, if it was asked for.
        state_gradient: of the state that was given, None where nothing read it.
        border_elements: the most elements that were kept at borders at one time.
    """

    loss_sum: Tensor
    weight_sum: Tensor
    state: Any
    state_gradient: Any
    border_elements: int


def chunks_of(documents: Documents, chunk_tokens: int, keep_state: bool = False, alike: bool = False) -> list[Chunk]:
    """Cut a stream into chunks, the last one shorter; an empty stream is one empty chunk.

    Args:
        chunk_tokens: C.
        keep_state: the stream goes on after its last token.
        alike: every chunk but the last hands on its state, be it that the next one begins a document.
    """
    bounds, length = documents.bounds, documents.num_tokens
    chunks = []
    for start in range(0, max(length, 1), chunk_tokens):
        stop = min(start + chunk_tokens, length)
        inside = bounds[bisect_right(bounds, start) : bisect_left(bounds, stop)]
        cut = sorted({0, *(bound - start for bound in inside), stop - start})
        goes_on = keep_state if stop == length else alike or documents.position(stop) > 0
        chunks.append(Chunk(start, stop, Documents(cut, documents.position(start)), goes_on))
    return chunks


def check_streamable(model: nn.Module) -> None:
    """Refuse a model whose gradients chunks cannot give.

    Raises:
        UserError: it looks both ways (a prefix, too).
    """
    prefix = tuple(MIXERS[name] for name in PREFIX_MIXERS)
    for name, module in model.named_modules():
        mask = getattr(module, "mask", None)
        both_ways = mask is not None and not getattr(mask, "causal", True)
        if both_ways or isinstance(module, (BidirectionalMixer, *prefix)):
            raise UserError(
                f"Layer {name!r} ({type(module).__name__}) looks both ways, so a stream cannot be cut into chunks: leave "
                "stream_tokens out and spread the sequence over more ranks."
            )


def held(values: Tensor, chunk: Chunk, shard: SequenceShard) -> Tensor:
    """The values [T] of a chunk's tokens held here, on the shard's device."""
    segments = shard.segments
    ranges = zip(segments.part_starts, segments.part_lengths())
    parts = [values[chunk.start + first : chunk.start + first + length] for first, length in ranges]
    return torch.cat([values[:0], *parts]).to(shard.device)


class Streaming:
    """Runs streams through a model in chunks.

    Args:
        model: `model(tokens, shard, state)` -> hidden, state, and with `labels` and `weights` -> `LossOutput`.
        chunk_tokens: C.
        make_shard: the part of a chunk that is held here.
        keep: where border states wait for their chunk's replay: `all` where they were made; `two_level` there too, but
            only every `every`-th, the others being computed again when they are needed; `cpu`; `disk`.
        every: of `two_level`; about the square root of n if left out.
        folder: of `disk`; the system's folder for temporary files if left out.
        truncate: states are handed on without gradients, and each chunk is run once: cheaper, not exact.
        accumulate: around forward and backward of each replay, with whether it is the last of the step.
        alike: the graph of a chunk has one shape whatever its documents: all its states take part in the backward.
    """

    def __init__(
        self,
        model: Model,
        chunk_tokens: int,
        make_shard: MakeShard,
        *,
        keep: str = "all",
        every: int | None = None,
        folder: Path | None = None,
        truncate: bool = False,
        accumulate: Callable[[bool], AbstractContextManager[None]] = lambda last: nullcontext(),
        alike: bool = False,
    ) -> None:
        if chunk_tokens < 1:
            raise UserError(f"stream_tokens is {chunk_tokens}: give 1 or more.")
        if keep not in KEEP:
            raise UserError(f"Border states are kept by {', '.join(KEEP)}, not {keep!r}.")
        if every is not None and (keep != "two_level" or every < 1):
            raise UserError(f"every is {every} with keep {keep!r}: it is 1 or more, and of two_level only.")
        self.model, self.chunk_tokens, self.make_shard = model, chunk_tokens, make_shard
        self.keep, self.every, self.folder = keep, every, folder
        self.truncate, self.accumulate, self.alike = truncate, accumulate, alike

    def backward(
        self, stream: LongStream, state: Any = None, *, scale: float = 1.0, keep_state: bool = False, last: bool = True
    ) -> Streamed:
        """Add the gradients of `scale * loss_sum` to the parameters'.

        How often and in which order the model is called depends on T and C alone, so that data-parallel groups with
        different documents stay in step.

        Args:
            state: what came before the stream, read if `documents.first_position > 0`.
            keep_state: return the state after the stream.
            last: no other stream of this step follows: the first chunk's replay is the one that reduces gradients.
        """
        chunks = chunks_of(stream.documents, self.chunk_tokens, keep_state, self.alike)
        entering = _detached(state) if stream.documents.first_position else None
        if self.truncate:
            return self._truncated(stream, chunks, entering, scale, last)
        sums = _Sums()
        totals = DocumentTotals(stream.documents, stream.weights) if len(chunks) > 1 else None
        final, cotangent = None, None
        with Borders(self.keep, self.folder, self._capacity(len(chunks))) as borders:
            borders.push(0, 0, entering)
            del entering
            self._advance(stream, chunks, borders, len(chunks) - 1, totals, self._kept(len(chunks)))
            if totals is not None:
                self._complete(stream, chunks[-1], borders, totals)
            for index in reversed(range(len(chunks))):
                if borders.index < index:
                    self._advance(stream, chunks, borders, index, totals, lambda border: True)
                after, cotangent = self._replay(
                    stream, chunks[index], borders.pop(), cotangent, totals, scale, sums, last and index == 0
                )
                if index == len(chunks) - 1:
                    final = _detached(after)
                del after
            return Streamed(sums.loss, sums.weight, final, cotangent, borders.peak)

    @torch.no_grad()
    def evaluate(self, stream: LongStream, state: Any = None, *, keep_state: bool = False, like: int = 0) -> Streamed:
        """The loss alone, one chunk at a time; nothing is kept.

        Args:
            like: tokens of a stream whose number of forwards is run, the last ones on nothing, where this one has fewer: every
                process takes part in every forward.
        """
        sums = _Sums()
        chunks = chunks_of(stream.documents, self.chunk_tokens, keep_state)
        for chunk in chunks:
            output = self._forward(stream, chunk, state, with_loss=True)
            sums.add(output)
            state = output.state
        nothing = chunks_of(Documents((0,)), self.chunk_tokens)
        for chunk in nothing * (-(-like // self.chunk_tokens) - len(chunks)):
            self._forward(stream, chunk, None, with_loss=True)
        return Streamed(sums.loss, sums.weight, state, None, 0)

    def _every(self, n: int) -> int:
        return self.every or math.isqrt(max(n - 1, 0)) + 1

    def _capacity(self, n: int) -> int:
        """Borders held at one time."""
        return n if self.keep != "two_level" else (n - 1) // self._every(n) + min(self._every(n), n)

    def _kept(self, n: int) -> Callable[[int], bool]:
        """Which borders the first pass keeps; of the last run of chunks, which is replayed at once, all."""
        if self.keep != "two_level":
            return lambda border: True
        every = self._every(n)
        last = (n - 1) // every * every
        return lambda border: border % every == 0 or border > last

    def _forward(
        self, stream: LongStream, chunk: Chunk, state: Any, with_loss: bool, totals: DocumentTotals | None = None
    ) -> Any:
        """`LossOutput`, or the state alone."""
        shard = self.make_shard(chunk.documents, chunk.goes_on)
        if totals is not None:
            shard = totals.shard(shard, chunk.start)
        tokens = held(stream.tokens, chunk, shard)
        if not chunk.documents.first_position:
            state = None
        if not with_loss:
            return self.model(tokens, shard, state)[1]
        labels, weights = held(stream.labels, chunk, shard), held(stream.weights, chunk, shard)
        return self.model(tokens, shard, state, labels=labels, weights=weights)

    @torch.no_grad()
    def _advance(
        self,
        stream: LongStream,
        chunks: list[Chunk],
        borders: Borders,
        target: int,
        totals: DocumentTotals | None,
        kept: Callable[[int], bool],
    ) -> None:
        """From the last border that is held to border `target`, keeping those of the borders on the way that are wanted."""
        state = borders.top()
        for index in range(borders.index, target):
            state = self._forward(stream, chunks[index], state, with_loss=False, totals=totals)
            if kept(index + 1):
                borders.push(index + 1, chunks[index + 1].start, state)

    @torch.no_grad()
    def _complete(self, stream: LongStream, chunk: Chunk, borders: Borders, totals: DocumentTotals) -> None:
        """Add the last chunk's part of the documents' sums, if the model asks for any: it was left out of the first pass."""
        if totals.tables:
            self._forward(stream, chunk, borders.top(), with_loss=False, totals=totals)
        totals.complete = True

    def _replay(
        self,
        stream: LongStream,
        chunk: Chunk,
        state: Any,
        cotangent: Any,
        totals: DocumentTotals | None,
        scale: float,
        sums: _Sums,
        last: bool,
    ) -> tuple[Any, Any]:
        """Forward and backward of one chunk; the state after it, and the gradient of the state before it."""
        entering = tree_map_only(Tensor, _leaf, state)
        with self.accumulate(last):
            output = self._forward(stream, chunk, entering, with_loss=True, totals=totals)
            sums.add(output)
            roots: list[Tensor] = [output.loss_sum * scale]
            gradients: list[Tensor | None] = [None]
            leaves = tree_leaves(output.state)
            for root, gradient in zip(leaves, [None] * len(leaves) if cotangent is None else tree_leaves(cotangent)):
                if root is not None and root.requires_grad and (gradient is not None or self.alike):
                    roots.append(root)
                    gradients.append(torch.zeros_like(root) if gradient is None else gradient)
            torch.autograd.backward(roots, gradients)
        return output.state, tree_map(lambda leaf: leaf.grad if isinstance(leaf, Tensor) else None, entering)

    def _truncated(self, stream: LongStream, chunks: list[Chunk], state: Any, scale: float, last: bool) -> Streamed:
        sums = _Sums()
        for index, chunk in enumerate(chunks):
            with self.accumulate(last and index == len(chunks) - 1):
                output = self._forward(stream, chunk, state, with_loss=True)
                sums.add(output)
                (output.loss_sum * scale).backward()
            state = _detached(output.state)
        return Streamed(sums.loss, sums.weight, state, None, 0)


class _Sums:
    """Of loss and weight over chunks, float64."""

    def __init__(self) -> None:
        self.loss = self.weight = torch.zeros((), dtype=torch.float64)

    def add(self, output: Any) -> None:
        loss = output.loss_sum.detach()
        self.loss = self.loss.to(loss.device) + (loss if output.aux_sum is None else loss - output.aux_sum)
        self.weight = self.weight.to(output.weight_sum.device) + output.weight_sum.detach()


def _leaf(tensor: Tensor) -> Tensor:
    """A leaf of a graph of its own; integers have no gradient."""
    return tensor.detach().requires_grad_(tensor.is_floating_point() or tensor.is_complex())


def _detached(state: Any) -> Any:
    return tree_map_only(Tensor, Tensor.detach, state)
