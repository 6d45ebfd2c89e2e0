"""The held-out documents, and what a model must beat on them."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import pytest

from longhaul.launcher.data import (
    ByteTokenizer,
    DataConfig,
    PackedStreams,
    ValidationStreams,
    byte_unigram_nats,
    load_data,
    open_corpus,
    split_corpus,
    token_counts,
)
from longhaul.models.errors import UserError

from .corpora import EOD, make_corpus
from .test_corpus import write_jsonl


@pytest.mark.parametrize("fraction", [0.001, 0.02, 0.5, 0.999])
@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_every_document_is_on_one_side(fraction: float, seed: int) -> None:
    corpus = make_corpus([2] * 1000)
    train, held_out = split_corpus(corpus, fraction, seed)
    assert held_out is not None
    train_keys, held_keys = set(train.keys.tolist()), set(held_out.keys.tolist())
    assert not train_keys & held_keys and train_keys | held_keys == set(corpus.keys.tolist())
    assert len(train) + len(held_out) == 1000 and len(train) and len(held_out)
    assert abs(len(held_out) / 1000 - fraction) < 0.05
    assert train.keys.tolist() == sorted(train_keys)  # the order of the corpus


def test_nothing_is_held_out_when_nothing_is_asked() -> None:
    corpus = make_corpus([2, 3])
    assert split_corpus(corpus, 0.0, seed=1) == (corpus, None)


def test_two_documents_are_enough_and_one_is_not(tmp_path: Path) -> None:
    for fraction in (1e-9, 0.5, 0.999999):
        train, held_out = split_corpus(make_corpus([2, 3]), fraction, seed=1)
        assert held_out is not None and len(train) == len(held_out) == 1
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "same"}] * 3)
    with pytest.raises(UserError, match=r"data\.validation_fraction.*only 1"):
        split_corpus(open_corpus([path], cache_dir=tmp_path / "cache"), 0.1, seed=1)


def test_copies_and_additions(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}"} for n in range(300)]
    few = open_corpus([write_jsonl(tmp_path / "few.jsonl", rows)], cache_dir=tmp_path / "cache")
    more = open_corpus(
        [write_jsonl(tmp_path / "more.jsonl", [{"text": "new"}, *rows, *rows])], cache_dir=tmp_path / "cache"
    )
    (_, held_few), (train_more, held_more) = split_corpus(few, 0.2, 7), split_corpus(more, 0.2, 7)
    assert held_few is not None and held_more is not None
    assert set(held_few.keys.tolist()) == set(held_more.keys.tolist()) & set(few.keys.tolist())
    assert not set(held_more.keys.tolist()) & set(train_more.keys.tolist())  # no copy on the other side
    _, other = split_corpus(few, 0.2, 8)
    assert other is not None and set(other.keys.tolist()) != set(held_few.keys.tolist())


def test_data_is_the_same_in_another_process(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"text": "word " * n} for n in range(1, 60)])
    script = (
        "import sys; from longhaul.launcher.data import *\n"
        "c = DataConfig(paths=(sys.argv[1],), cache_dir=sys.argv[2], validation_fraction=0.3, seq_length=50)\n"
        "d = load_data(c); print(d.train.fingerprint, d.held_out_corpus.fingerprint, d.train.stream(31).bounds)"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "x.jsonl"), str(tmp_path / cache)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for cache in ("cache", "another")
    }
    assert len(found) == 1 and "(0, " in found.pop()


def test_load_data(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"body": f"text {n}"} for n in range(50)])
    options: dict[str, Any] = {
        "paths": (str(path),),
        "text_field": "body",
        "cache_dir": str(tmp_path / "cache"),
        "seq_length": 16,
    }
    data = load_data(DataConfig(**options, validation_fraction=0.3, validation_tokens=40))
    assert isinstance(data.tokenizer, ByteTokenizer)
    assert data.held_out_corpus is not None and data.validation is not None
    assert len(data.train_corpus) + len(data.held_out_corpus) == 50
    assert [len(s.tokens) for s in data.validation] == [16, 16, 8]
    assert data.train.fingerprint == PackedStreams(data.train_corpus, 16, 1).fingerprint
    without = load_data(DataConfig(**options, validation_fraction=0.0))
    assert without.validation is None and without.held_out_corpus is None and len(without.train_corpus) == 50


def test_the_configuration_is_read_by_jsonargparse() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=DataConfig, default=DataConfig())

    def parse(*arguments: str) -> DataConfig:
        return DataConfig(**parser.parse_args(list(arguments)).data.as_dict())

    assert parse("--data.paths=[a.txt, b]", "--data.seq_length=64") == DataConfig(paths=("a.txt", "b"), seq_length=64)
    assert parse() == DataConfig()


def test_counts() -> None:
    corpus = make_corpus([3, 5])
    expected = np.bincount(corpus.tokens, minlength=EOD + 1).tolist()
    assert token_counts(corpus, EOD + 1).tolist() == expected
    assert token_counts(corpus, EOD + 1, limit=3).tolist() == np.bincount(corpus.tokens[:3], minlength=EOD + 1).tolist()
    train = corpus.select(np.asarray([1]))
    assert token_counts(train, EOD + 1).sum() == 5


def test_unigram_by_hand() -> None:
    heldout = make_corpus([3, 1, 4])
    counts = np.arange(EOD + 1)
    total = sum(n + 1 for n in range(EOD + 1))
    targets = [t for d in range(3) for t in heldout.document(d).tolist()[1:]]
    expected = -sum(math.log((t + 1) / total) for t in targets) / len(targets)
    for seq_length in (1, 3, 100):
        assert byte_unigram_nats(counts, ValidationStreams(heldout, seq_length)) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="no target"):
        byte_unigram_nats(counts, ValidationStreams(make_corpus([1]), 4))


def test_unigram_of_the_standard_library(tmp_path: Path) -> None:
    data = load_data(DataConfig(cache_dir=str(tmp_path)))
    assert data.validation is not None
    counts = token_counts(data.train_corpus, data.tokenizer.vocab_size, limit=1 << 22)
    assert 2.9 < byte_unigram_nats(counts, data.validation) < 3.6  # uniform would be 5.55
