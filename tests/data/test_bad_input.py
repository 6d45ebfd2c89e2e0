"""Every mistake a person can make with data: one sentence that names it and the remedy, and nothing half done."""

import gzip
import json
import logging
import re
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longhaul.launcher.data import Corpus, DataConfig, FileTokenizer, open_corpus
from longhaul.models.errors import UserError

from .test_tokenizer import write_tokenizer


def refused(tmp_path: Path, *paths: Path, says: list[str], **options: Any) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(UserError) as caught:
        open_corpus(paths, cache_dir=cache, **options)
    message = str(caught.value)
    for part in says:
        assert part in message, message
    assert "\n" not in message and message.endswith(".")
    assert not cache.exists() or not list(cache.iterdir())


def skipping(tmp_path: Path, *paths: Path, **options: Any) -> Corpus:
    return open_corpus(paths, cache_dir=tmp_path / "cache", on_bad_document="skip", **options)


def contents(corpus: Corpus) -> list[bytes]:
    return [corpus.document(d)[:-1].astype(np.uint8).tobytes() for d in range(len(corpus))]


def test_a_missing_path(tmp_path: Path) -> None:
    refused(tmp_path, tmp_path / "nowhere", says=[str(tmp_path / "nowhere"), "does not exist", "data.paths"])


def test_a_folder_without_documents(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "x.bin").write_bytes(b"x")
    refused(tmp_path, tmp_path / "bare", says=[str(tmp_path / "bare"), ".jsonl"])


def test_a_file_of_an_unknown_kind(tmp_path: Path) -> None:
    (tmp_path / "x.docx").write_bytes(b"x")
    refused(tmp_path, tmp_path / "x.docx", says=["x.docx", ".parquet"])


def test_a_file_that_vanished(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "x.txt").symlink_to(tmp_path / "gone")
    refused(tmp_path, tmp_path / "docs", says=[str(tmp_path / "docs" / "x.txt"), "No such file"])


def test_a_file_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.txt").write_text("x")

    def forbidden(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    refused(tmp_path, tmp_path / "x.txt", says=["x.txt", "Permission denied", "data.paths"])


def test_a_python_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    refused(tmp_path, says=[str(tmp_path), "data.paths"])


def test_sources_of_python_broken_on_purpose_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "lib"
    root.mkdir()
    (root / "bad_coding.py").write_bytes(b"# \xe9")
    (root / "good.py").write_bytes(b"# ok")
    (root / "dangling.py").symlink_to(root / "not-installed")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))
    corpus = open_corpus(cache_dir=tmp_path / "cache")
    assert contents(corpus) == [b"# ok"] and corpus.skipped_documents == 1


def test_only_empty_documents(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt", "d.txt"):
        (tmp_path / name).touch()
    refused(tmp_path, tmp_path, says=[str(tmp_path / "a.txt"), "1 other files", "4 empty"])


BAD_LINES = {
    "no json": (b"{oops", "is not JSON"),
    "not utf-8": (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
    "no field": (b'{"body": "x"}', "'text'"),
    "not a string": (b'{"text": 3}', "data.text_field"),
    "null": (b'{"text": null}', "data.text_field"),
    "not an object": (b"[1]", "data.text_field"),
    "half a surrogate pair": (b'{"text": "ab\\ud800"}', "surrogate pair at character 2"),
    "too deep": (b"[" * 100_000, "is not JSON"),
}


@pytest.mark.parametrize(("line", "problem"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_jsonl_line(tmp_path: Path, caplog: pytest.LogCaptureFixture, line: bytes, problem: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "three"}\n')
    refused(tmp_path, path, says=[f"{path} line 2", problem, "data.on_bad_document"])
    with caplog.at_level(logging.WARNING):
        corpus = skipping(tmp_path, path)
    assert contents(corpus) == [b"one", b"three"] and corpus.skipped_documents == 1
    assert f"{path} line 2" in caplog.text
    assert skipping(tmp_path, path).skipped_documents == 1  # from the cache
    with pytest.raises(UserError, match="line 2"):  # which is not for those who asked for an error
        open_corpus([path], cache_dir=tmp_path / "cache")


def test_text_that_is_not_utf8_for_a_tokenizer_of_text(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_bytes(b"abc\xffabc")
    (tmp_path / "docs" / "b.txt").write_bytes(b"ab")
    tokenizer = FileTokenizer(write_tokenizer(tmp_path / "tokenizer.json"))
    says = [str(tmp_path / "docs" / "a.txt"), "not UTF-8 at byte 3", "data.on_bad_document"]
    refused(tmp_path, tmp_path / "docs", tokenizer=tokenizer, says=says)
    corpus = skipping(tmp_path, tmp_path / "docs", tokenizer=tokenizer)
    assert len(corpus) == 1 and corpus.skipped_documents == 1


def test_nothing_left_after_skipping(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"body": "x"}))
    refused(tmp_path, tmp_path / "x.jsonl", on_bad_document="skip", says=["x.jsonl", "1 unreadable"])


@pytest.mark.parametrize("data", [b"not gzip", gzip.compress(b'{"text": "abc"}\n' * 99)[:-12]])
def test_a_damaged_gzip_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(data)
    for mode in ("error", "skip"):
        refused(tmp_path, path, on_bad_document=mode, says=[str(path), "damaged", "data.paths"])


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(b"not parquet at all")
    refused(tmp_path, path, says=[str(path), "not readable as parquet"])


def test_a_parquet_column_that_is_missing_or_no_text(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), path)
    refused(tmp_path, path, says=[str(path), "'text'", "body, n"])
    refused(tmp_path, path, text_field="n", says=[str(path), "'n'", "int64"])


def test_a_parquet_row_without_text(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a", None, "c"]}), path)
    refused(tmp_path, path, says=[f"{path} row 2", "data.on_bad_document"])
    corpus = skipping(tmp_path, path)
    assert contents(corpus) == [b"a", b"c"] and corpus.skipped_documents == 1


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a"]}), path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused(tmp_path, path, says=[str(path), "pyarrow", "longhaul[data]"])


CONFIG: dict[str, tuple[Any, str]] = {
    "paths": ("docs", "['docs']"),
    "tokenizer": ("", "byte"),
    "text_field": ("", "field"),
    "seq_length": (1, "1"),
    "validation_fraction": (1.0, "1.0"),
    "validation_tokens": (0, "validation_fraction"),
    "seed": (-1, "-1"),
    "on_bad_document": ("ignore", "skip"),
}


@pytest.mark.parametrize("name", CONFIG)
def test_a_bad_configuration(name: str) -> None:
    value, part = CONFIG[name]
    with pytest.raises(UserError, match=rf"data\.{name}.*{re.escape(part)}"):
        DataConfig(**{name: value})


def test_a_negative_validation_fraction() -> None:
    with pytest.raises(UserError, match=r"data\.validation_fraction is -0\.1"):
        DataConfig(validation_fraction=-0.1)
