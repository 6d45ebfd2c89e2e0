"""Held-out documents, chosen by content."""

from __future__ import annotations

import numpy as np

from longhaul.models.errors import UserError

from .corpus import Corpus


def split_corpus(corpus: Corpus, validation_fraction: float, seed: int) -> tuple[Corpus, Corpus | None]:
    """Documents to train on and documents held out.

    A document's side follows from a hash of its text and the seed: copies of a text are on one side, every tokenizer
    holds out the same ones, and adding documents moves no other. Each side is sure of one text, however few there are.

    Args:
        corpus: all documents.
        validation_fraction: share of the documents to hold out, at least 0 and below 1; met on average.
        seed: another seed holds out others.

    Returns:
        Training documents in the order of the corpus, and held-out ones in an order of their own that does not follow
        file names, so that the first few are as good a sample as any; None if the fraction is 0.

    Raises:
        UserError: all documents have one text, so there is nothing to hold out.
    """
    if validation_fraction == 0:
        return corpus, None
    draws = _mix(corpus.keys ^ _mix(np.asarray([seed], dtype=np.uint64)))
    lowest, highest = draws.min(), draws.max()
    if lowest == highest:
        raise UserError(
            f"Holding out {validation_fraction:g} of the documents (data.validation_fraction) needs at least 2 "
            f"different ones and there is only 1: add documents or set data.validation_fraction to 0."
        )
    threshold = np.uint64(int(validation_fraction * 2.0**64))
    held_out = ((draws < threshold) | (draws == lowest)) & (draws != highest)
    chosen = np.flatnonzero(held_out)
    order = np.argsort(corpus.keys[chosen], kind="stable")
    return corpus.select(np.flatnonzero(~held_out)), corpus.select(chosen[order])


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection that looks random; uint64 in and out."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = z ^ (z >> np.uint64(31))
    return mixed
