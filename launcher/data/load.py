"""From a configuration to everything a trainer reads."""

from __future__ import annotations

from dataclasses import dataclass

from .config import DataConfig
from .corpus import Corpus, open_corpus
from .packing import PackedStreams, ValidationStreams
from .split import split_corpus
from .tokenizer import Tokenizer, open_tokenizer
from .two_part import TwoPart


@dataclass(frozen=True, eq=False)
class Data:
    """Streams to train and to judge on, and what they are made of."""

    tokenizer: Tokenizer
    train_corpus: Corpus
    held_out_corpus: Corpus | None
    train: PackedStreams
    validation: ValidationStreams | None
    """None if nothing is held out."""
    vocab_size: int
    """Ids that occur in streams: the tokenizer's, and one for a masked token if some are."""


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
    objective, repeat = _objective(config, tokenizer), config.repeat_context
    validation = None
    if held_out is not None:
        validation = ValidationStreams(held_out, config.seq_length, config.validation_tokens, repeat, objective)
    return Data(
        tokenizer=tokenizer,
        train_corpus=train,
        held_out_corpus=held_out,
        train=PackedStreams(train, config.seq_length, config.seed, repeat, objective),
        validation=validation,
        vocab_size=tokenizer.vocab_size + (objective is not None),
    )


def _objective(config: DataConfig, tokenizer: Tokenizer) -> TwoPart | None:
    if not config.prefix_length:
        return None
    return TwoPart(
        prefix_length=config.prefix_length,
        mask_id=tokenizer.vocab_size,
        rate=config.mask_rate,
        weight=config.mask_weight,
        seed=config.seed,
    )
