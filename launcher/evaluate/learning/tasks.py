"""Synthetic tasks whose answers follow from the tokens of one document: recall, induction, state tracking.

A sampler gives documents of one length, tokens [B, T] and answers [B, T]: the answer is what the model is to say at a token,
`NONE` where nothing is asked. Documents are then packed into one stream, as everywhere.

    mqar         n pairs of a key and a value, then the n keys in another order; at each, its value (Arora et al.,
                 arXiv 2312.04927, with all keys asked once and no filler)
    induction    n distinct tokens, then the same again from a random one on, round and round; at each, the next token
                 (Olsson et al., arXiv 2209.11895: what followed the last time this token was seen)
    parity       bits; at each, the parity of the bits so far
    modular      digits 0 .. 2; at each, the sum so far modulo 3
    long_recall  3 pairs, noise, and the 3 keys in another order at the very end; at each, its value

Legend: B documents, T tokens of each, n pairs or distinct tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

NONE = -1
Sample = tuple[np.ndarray, np.ndarray]


def mqar(random: np.random.Generator, documents: int, length: int, keys: int = 32, values: int = 32) -> Sample:
    """`length` is a multiple of 3: n pairs, n questions. Keys are tokens 0 .. keys - 1, values follow."""
    n = length // 3
    assert length == 3 * n and n <= keys, f"{length} tokens are not n pairs and n questions with n up to {keys}"
    chosen = random.permuted(np.tile(np.arange(keys), (documents, 1)), axis=1)[:, :n]
    value = random.integers(keys, keys + values, (documents, n))
    order = random.permuted(np.tile(np.arange(n), (documents, 1)), axis=1)
    pairs = np.stack([chosen, value], axis=-1).reshape(documents, 2 * n)
    tokens = np.concatenate([pairs, np.take_along_axis(chosen, order, 1)], axis=1)
    answers = np.full_like(tokens, NONE)
    answers[:, 2 * n :] = np.take_along_axis(value, order, 1)
    return tokens, answers


def induction(random: np.random.Generator, documents: int, length: int, vocabulary: int = 32) -> Sample:
    """Half of the document is distinct tokens."""
    n = length // 2
    assert 2 <= n <= vocabulary, f"{length} tokens are not twice 2 .. {vocabulary} distinct ones"
    first = random.permuted(np.tile(np.arange(vocabulary), (documents, 1)), axis=1)[:, :n]
    start = random.integers(0, n, (documents, 1))
    again = (start + np.arange(length - n + 1)) % n
    # Round the end: what followed the last token of the first half is the first token of the second.
    followed = np.take_along_axis(first, again, 1)
    tokens = np.concatenate([first, followed[:, :-1]], axis=1)
    answers = np.full_like(tokens, NONE)
    answers[:, n:] = followed[:, 1:]
    at_end = again[:, :-1] == n - 1
    answers[:, n:][at_end] = NONE  # another token followed the first time than follows now
    return tokens, answers


def parity(random: np.random.Generator, documents: int, length: int) -> Sample:
    tokens = random.integers(0, 2, (documents, length))
    return tokens, np.cumsum(tokens, axis=1) % 2


def modular(random: np.random.Generator, documents: int, length: int, modulus: int = 3) -> Sample:
    tokens = random.integers(0, modulus, (documents, length))
    return tokens, np.cumsum(tokens, axis=1) % modulus


def long_recall(
    random: np.random.Generator, documents: int, length: int, pairs: int = 3, keys: int = 8, values: int = 8, noise: int = 8
) -> Sample:
    """The distance between a pair and its question is about the length. Noise is neither key nor value."""
    gap = length - 3 * pairs
    assert gap >= 0, f"{length} tokens do not hold {pairs} pairs and questions"
    tokens, answers = mqar(random, documents, 3 * pairs, keys, values)
    between = random.integers(keys + values, keys + values + noise, (documents, gap))
    tokens = np.concatenate([tokens[:, : 2 * pairs], between, tokens[:, 2 * pairs :]], axis=1)
    return tokens, np.concatenate([answers[:, : 2 * pairs], np.full_like(between, NONE), answers[:, 2 * pairs :]], axis=1)


@dataclass(frozen=True, kw_only=True)
class Task:
    """How a task is trained and tested; the same for every model."""

    sample: Callable[[np.random.Generator, int, int], Sample]
    """Generator, B and T to a sample."""

    vocab_size: int

    chance: float
    """Accuracy of a guess that knows what kind of token is asked for."""

    train_lengths: tuple[int, ...]
    """Rising."""

    test_lengths: tuple[int, ...]

    steps: int
    """At most; a run ends early once it answers everything right."""

    rates: tuple[float, ...]
    """Learning rates that are tried."""

    tokens: int
    """Of a step, about: documents of one length fill them."""

    grows: bool = False
    """Documents start short and grow as they are learned (`train.Lengths`), instead of having any length from the start."""

    second_half: bool = False
    """Judge only the answers in the second half of a document: the first ones are easy."""

    test_documents: int = 32
    """At least, of each length; shorter ones fill 8,192 tokens."""

    def judged_from(self, length: int) -> int:
        return length // 2 if self.second_half else 0


_TRACKING: dict[str, Any] = {
    "rates": (1e-2, 2e-2),
    "tokens": 768,
    "train_lengths": tuple(range(2, 41)),
    "test_lengths": (40, 80, 256),
    "grows": True,
    "second_half": True,
}

TASKS = {
    # Chance: one of 32 values, 32 tokens, 2 bits, 3 residues, 8 values.
    "mqar": Task(
        sample=mqar,
        vocab_size=64,
        chance=1 / 32,
        train_lengths=(12, 24, 48, 72),
        test_lengths=(48, 72, 96),
        steps=600,
        rates=(5e-3, 1e-2),
        tokens=1536,
    ),
    "induction": Task(
        sample=induction,
        vocab_size=32,
        chance=1 / 32,
        train_lengths=(8, 16, 32, 48),
        test_lengths=(32, 48, 64),
        steps=600,
        rates=(5e-3, 1e-2),
        tokens=1024,
    ),
    "parity": Task(sample=parity, vocab_size=2, chance=1 / 2, steps=800, **_TRACKING),
    "modular": Task(sample=modular, vocab_size=3, chance=1 / 3, steps=800, **_TRACKING),
    "long_recall": Task(
        sample=long_recall,
        vocab_size=24,
        chance=1 / 8,
        train_lengths=(9, 12, 16, 24, 32, 48, 64),
        test_lengths=(64, 256, 1024),
        steps=500,
        rates=(5e-3, 1e-2),
        tokens=768,
        test_documents=160,
    ),
}
