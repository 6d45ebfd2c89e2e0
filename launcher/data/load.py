"""From a configuration to everything a trainer reads."""

from __future__ import annotations

from dataclasses import dataclass

from .config import DataConfig
from .corpus import Corpus, open_corpus
from .packing import PackedStreams, ValidationStreams
from .split import split_corpus
from .tokenizer import Tokenizer, open_tokenizer


@dataclass(frozen=True, eq=False)
class Data:
    """Streams to train and to judge on, and what they are made of."""

    tokenizer: Tokenizer
    train_corpus: Corpus
    held_out_corpus: Corpus | None
    train: PackedStreams
    validation: ValidationStreams | None
    """None if nothing is held out."""


def load_data(config: DataConfig) -> Data:
    """Open, split and pack what `config` names; the same on every rank that sees the same files.

    Raises:
        UserError: something in `config`, or in the files it names, has to be mended.
    """
    tokenizer = open_tokenizer(config.tokenizer)
    corpus = open_corpus(
        config.paths,
        config.text_field,
        tokenizer,
        on_bad_document=config.on_bad_document,
        cache_dir=config.cache_dir,
    )
    train, held_out = split_corpus(corpus, config.validation_fraction, config.seed)
    return Data(
        tokenizer=tokenizer,
        train_corpus=train,
        held_out_corpus=held_out,
        train=PackedStreams(train, config.seq_length, config.seed),
        validation=None
        if held_out is None
        else ValidationStreams(held_out, config.seq_length, config.validation_tokens),
    )
