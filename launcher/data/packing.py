"""Streams of tokens packed from whole documents.

Epochs follow each other without a gap, each a shuffle of all documents, and sample `i` is tokens `i*T .. (i+1)*T` of
that endless row. So a sample follows from its number alone, and the position in the data is a count of samples that
means the same on any number of ranks.

Letters: `T` tokens of a stream, `D` documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, overload

import numpy as np
import torch

from .corpus import Corpus


@dataclass(frozen=True, eq=False)
class Stream:
    """`T` consecutive tokens of packed documents, with their labels already shifted."""

    tokens: torch.Tensor
    """int64 [T]"""
    labels: torch.Tensor
    """int64 [T]: the next token of the same document, also if that is in the next stream; 0 at its last one."""
    weights: torch.Tensor
    """float32 [T]: 1 where there is a next token, 0 at the last token of a document and where the next one is repeated.
    An objective may have made other labels and weights of these."""
    bounds: tuple[int, ...]
    """Document `d` owns tokens `bounds[d] .. bounds[d+1]`; the first is 0 and the last is `T`."""
    first_position: int
    """Tokens of the first document that are in earlier streams."""


class Objective(Protocol):
    """What a stream asks of a model, if not the next token everywhere."""

    @property
    def fingerprint(self) -> str:
        """Equal exactly when the same is asked."""
        ...

    def training(self, stream: Stream, index: int) -> Stream:
        """Sample `index` as it is trained on; the same whenever it is read."""
        ...

    def held_out(self, stream: Stream) -> Stream: ...


class _Row:
    """Documents end to end in one order.

    Args:
        corpus: the documents.
        order: int64 [D], their order.
        repeat: the first so many tokens of every document (its end not among them) stand there twice.
    """

    def __init__(self, corpus: Corpus, order: np.ndarray, repeat: int = 0) -> None:
        self._tokens = corpus.tokens
        self._starts = corpus.starts[order]
        self._twice = repeated_tokens(corpus.lengths[order], repeat)
        self._lengths = corpus.lengths[order] + self._twice
        assert len(order) and self._lengths.min() > 0
        self._ends = np.cumsum(self._lengths)
        self.num_tokens = int(self._ends[-1])

    def cut(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
        """Tokens, labels and weights [end - begin], lengths of the pieces of documents, position of the first token."""
        first = int(np.searchsorted(self._ends, begin, side="right"))
        last = int(np.searchsorted(self._ends, end, side="left"))
        ends = self._ends[first : last + 1]  # [D] -> documents of this cut
        row_starts = ends - self._lengths[first : last + 1]
        pieces = np.minimum(ends, end) - np.maximum(row_starts, begin)
        position = np.arange(begin, end) - np.repeat(row_starts, pieces)
        start, twice = (np.repeat(of_documents[first : last + 1], pieces) for of_documents in (self._starts, self._twice))
        place = start + position - twice * (position >= twice)
        position += 1  # of the next token
        following = start + position - twice * (position >= twice)
        final = ends[ends <= end] - 1 - begin  # last tokens of documents
        following[final] = place[final]  # stays inside the array; overwritten below
        tokens, labels = (self._tokens[places].astype(np.int64) for places in (place, following))
        weights = ((position < twice) | (position >= 2 * twice)).astype(np.float32)
        weights[final] = 0
        labels[final] = 0
        return tokens, labels, weights, pieces, begin - int(row_starts[0])


def _stream(cuts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]]) -> Stream:
    tokens, labels, weights, pieces = (np.concatenate([cut[i] for cut in cuts]) for i in range(4))
    return Stream(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        weights=torch.from_numpy(weights),
        bounds=(0, *np.cumsum(pieces).tolist()),
        first_position=cuts[0][4],
    )


def repeated_tokens(lengths: np.ndarray, repeat: int) -> np.ndarray:
    """How many leading tokens of documents of these lengths are said twice, int64 [D]; never the token that ends one."""
    return np.minimum(lengths - 1, repeat)


class PackedStreams:
    """Endless streams of exactly `seq_length` tokens; nothing is dropped, padded or repeated within an epoch.

    A document that does not fit goes on at the start of the next stream. Reading is cheap near the epoch read last.

    Args:
        corpus: documents to train on.
        seq_length: `T`.
        seed: of the order of documents; each epoch has another order.
        repeat: the first so many tokens of every document are said twice.
        objective: what a stream asks for; the next token everywhere if left out.
    """

    def __init__(
        self, corpus: Corpus, seq_length: int, seed: int, repeat: int = 0, objective: Objective | None = None
    ) -> None:
        self._corpus = corpus
        self._seed = seed
        self._repeat = repeat
        self._objective = objective
        self._rows: tuple[tuple[int, _Row], ...] = ()
        self.seq_length = seq_length
        self.tokens_per_epoch = corpus.num_tokens + int(repeated_tokens(corpus.lengths, repeat).sum())
        facts = f"{corpus.fingerprint} {seq_length} {seed}"
        if repeat:
            facts += f" repeat {repeat}"
        if objective is not None:
            facts += f" {objective.fingerprint}"
        self.fingerprint = hashlib.sha256(facts.encode()).hexdigest()[:32]
        """Equal exactly when every sample is equal: a resumed run compares it before it trusts a sample count."""

    def stream(self, index: int) -> Stream:
        """Sample `index`, counted over all epochs from 0."""
        if index < 0:
            raise IndexError(f"sample {index} is negative")
        begin, end = index * self.seq_length, (index + 1) * self.seq_length
        cuts = []
        while begin < end:
            epoch, offset = divmod(begin, self.tokens_per_epoch)
            taken = min(end - begin, self.tokens_per_epoch - offset)
            cuts.append(self._row(epoch).cut(offset, offset + taken))
            begin += taken
        stream = _stream(cuts)
        return stream if self._objective is None else self._objective.training(stream, index)

    def epochs(self, samples: int) -> float:
        """Epochs that the first `samples` samples make."""
        return samples * self.seq_length / self.tokens_per_epoch

    def _row(self, epoch: int) -> _Row:
        for known, row in self._rows:
            if known == epoch:
                return row
        row = _Row(self._corpus, shuffled(len(self._corpus), self._seed, epoch), self._repeat)
        # Two are kept, because a stream on the seam of two epochs reads both. Replaced as a whole: threads may read.
        self._rows = ((epoch, row), *self._rows[:1])
        return row


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `count` documents, int64 [count], equal on every machine.

    Sorts raw draws, which NumPy promises to keep between versions, unlike `Generator.permutation`: a resumed run must
    find the same order after an upgrade.
    """
    draws = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(count)
    order: np.ndarray = np.argsort(draws, kind="stable")
    return order


class ValidationStreams(Sequence[Stream]):
    """Held-out documents in their own order, packed once; the last stream is shorter, not padded.

    Args:
        corpus: held-out documents.
        seq_length: `T` of every stream but the last.
        limit: use only that many tokens; by default all.
        repeat, objective: as of `PackedStreams`.
    """

    def __init__(
        self,
        corpus: Corpus,
        seq_length: int,
        limit: int | None = None,
        repeat: int = 0,
        objective: Objective | None = None,
    ) -> None:
        self._row = _Row(corpus, np.arange(len(corpus)), repeat)
        self._objective = objective
        self.seq_length = seq_length
        self.num_tokens = self._row.num_tokens if limit is None else min(limit, self._row.num_tokens)

    def __len__(self) -> int:
        return -(-self.num_tokens // self.seq_length)

    @overload
    def __getitem__(self, index: int) -> Stream: ...
    @overload
    def __getitem__(self, index: slice) -> list[Stream]: ...
    def __getitem__(self, index: int | slice) -> Stream | list[Stream]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"stream {index} of {len(self)}")
        begin = index % len(self) * self.seq_length
        stream = _stream([self._row.cut(begin, min(begin + self.seq_length, self.num_tokens))])
        return stream if self._objective is None else self._objective.held_out(stream)


def validation_streams(corpus: Corpus, seq_length: int, limit: int | None = None) -> Iterator[Stream]:
    """The streams of `ValidationStreams`, one after another."""
    return iter(ValidationStreams(corpus, seq_length, limit))
