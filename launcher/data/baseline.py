"""What a model must beat: single tokens counted on the training documents."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .corpus import Corpus
from .packing import Stream, ValidationStreams

_PIECE = 1 << 20


def token_counts(corpus: Corpus, vocab_size: int, limit: int | None = None) -> np.ndarray:
    """How often each token occurs, int64 [vocab_size].

    Args:
        corpus: documents to count.
        vocab_size: number of ids of the tokenizer.
        limit: count only that many tokens from the start; by default all.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for stream in ValidationStreams(corpus, _PIECE, limit):
        counts += np.bincount(stream.tokens.numpy(), minlength=vocab_size)
    return counts


def byte_unigram_nats(train_token_counts: np.ndarray, heldout: Iterable[Stream]) -> float:
    """Cross entropy of the unigram model, in nats per token, on the targets a model is judged on.

    Args:
        train_token_counts: [vocab_size]; one is added to each, so that no target has probability zero.
        heldout: streams whose labels of weight above 0 are the targets.
    """
    smoothed = train_token_counts.astype(np.float64) + 1
    log_probability = np.log(smoothed / smoothed.sum())
    targets = np.zeros(len(smoothed), dtype=np.int64)
    for stream in heldout:
        labels = stream.labels[stream.weights > 0].numpy()
        targets += np.bincount(labels, minlength=len(smoothed))
    total = targets.sum()
    if not total:
        raise ValueError("the held-out streams have no target")
    return float(-(targets * log_probability).sum() / total)
