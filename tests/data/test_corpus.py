"""Documents on disk to tokens: formats, order, cache."""

import gzip
import json
import multiprocessing
import os
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longhaul.launcher.data import ByteTokenizer, Corpus, CorpusSummary, describe, open_corpus
from longhaul.launcher.data.cache import default_cache_dir
from longhaul.models.errors import UserError

TEXTS = ["alpha\n", "b", "grün ☃", "two\nlines"]


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Corpus]:
    def call(*paths: Path, **options: Any) -> Corpus:
        return open_corpus(paths, cache_dir=tmp_path / "cache", **options)

    return call


def texts(corpus: Corpus) -> list[str]:
    documents = [corpus.document(d) for d in range(len(corpus))]
    assert all(document[-1] == 256 and 256 not in document[:-1] for document in documents)
    return [ByteTokenizer().decode(document) for document in documents]


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_parquet(path: Path, column: Sequence[str | None], name: str = "text", kind: Any = None) -> Path:
    pq.write_table(pa.table({"id": list(range(len(column))), name: pa.array(column, kind or pa.string())}), path)
    return path


def test_text_files_come_in_the_order_of_their_relative_paths(tmp_path: Path, opened: Callable[..., Corpus]) -> None:
    root = tmp_path / "docs"
    names = ["b.txt", "a/z.md", "a/c.py", "a.txt", "B.TXT"]
    for name in [*names, "a/ignored.bin", ".hidden.txt", ".git/x.txt", "__pycache__/y.py"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    assert texts(opened(root)) == ["B.TXT", "a.txt", "a/c.py", "a/z.md", "b.txt"]
    assert texts(opened(root / "b.txt", root / "a")) == ["b.txt", "a/c.py", "a/z.md"]
    assert texts(opened(root / "b.txt", root)) == ["b.txt", "B.TXT", "a.txt", "a/c.py", "a/z.md"]  # each once


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_jsonl(tmp_path: Path, opened: Callable[..., Corpus], name: str) -> None:
    path = write_jsonl(tmp_path / name, [{"body": text, "text": 1} for text in TEXTS])
    assert texts(opened(path, text_field="body")) == TEXTS


def test_jsonl_with_a_byte_order_mark_and_blank_lines(tmp_path: Path, opened: Callable[..., Corpus]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b"}')
    corpus = opened(path)
    assert texts(corpus) == ["a", "b"] and corpus.empty_documents == 0


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet(tmp_path: Path, opened: Callable[..., Corpus], kind: Any) -> None:
    many = TEXTS * 600  # more than a batch
    path = write_parquet(tmp_path / "x.parquet", many, name="body", kind=kind)
    assert texts(opened(path, text_field="body")) == many


def test_a_folder_may_mix_formats(tmp_path: Path, opened: Callable[..., Corpus]) -> None:
    root = tmp_path / "docs"
    root.mkdir()
    write_parquet(root / "c.parquet", ["three"])
    write_jsonl(root / "b.jsonl.gz", [{"text": "two"}])
    (root / "a.txt").write_text("one")
    assert texts(opened(root)) == ["one", "two", "three"]


def test_bytes_that_are_no_text_are_tokens_all_the_same(tmp_path: Path, opened: Callable[..., Corpus]) -> None:
    data = bytes(range(256))
    (tmp_path / "x.txt").write_bytes(data)
    assert opened(tmp_path / "x.txt").document(0).tolist() == [*data, 256]


def test_empty_documents_are_counted_and_left_out(tmp_path: Path, opened: Callable[..., Corpus]) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": text} for text in ["", "a", "", " "]])
    corpus = opened(path)
    assert texts(corpus) == ["a", " "] and corpus.empty_documents == 2
    assert opened(path).empty_documents == 2  # from the cache


def test_summary(tmp_path: Path, opened: Callable[..., Corpus]) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "x" * n} for n in range(102)])
    summary = describe(opened(path))
    assert summary == CorpusSummary(
        documents=101,
        tokens=sum(range(2, 103)),
        length_p50=52,
        length_p90=92,
        length_p99=101,
        length_max=102,
        empty_documents=1,
        skipped_documents=0,
    )
    assert "101 documents, 5,252 tokens" in str(summary) and "max 102" in str(summary)


def test_the_standard_library_is_the_default(tmp_path: Path) -> None:
    corpus = open_corpus(cache_dir=tmp_path)
    assert len(corpus) > 500
    assert open_corpus(["python-stdlib"], cache_dir=tmp_path).fingerprint == corpus.fingerprint
    assert len(list(tmp_path.iterdir())) == 1
    first = corpus.document(0)[:-1].astype(np.uint8).tobytes()
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py") if path.stat().st_size)
    names = [n for n in names if not {"site-packages", "dist-packages", "__pycache__"} & set(n.split("/"))]
    assert first == (root / names[0]).read_bytes()
    assert len(corpus) == len(names) - corpus.skipped_documents


def test_the_cache_is_reused_and_follows_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = tmp_path / "x.txt", tmp_path / "cache"
    path.write_text("one")
    before = open_corpus([path], cache_dir=cache)
    assert isinstance(before.tokens, np.memmap) and not before.tokens.flags.writeable

    with monkeypatch.context() as patch:
        patch.setattr(ByteTokenizer, "encode_batch", lambda self, texts: pytest.fail("tokenised again"))
        assert texts(open_corpus([path], cache_dir=cache)) == ["one"]

    path.write_text("two")  # the same size: only the clock tells
    os.utime(path, ns=(1, 1))
    after = open_corpus([path], cache_dir=cache)
    assert texts(after) == ["two"] and texts(before) == ["one"]
    assert after.fingerprint != before.fingerprint
    path.write_text("three")
    os.utime(path, ns=(1, 1))  # another size: the clock does not
    assert texts(open_corpus([path], cache_dir=cache)) == ["three"]
    assert len(list(cache.iterdir())) == 3


def test_the_cache_follows_the_field(tmp_path: Path, opened: Callable[..., Corpus]) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "one", "title": "two"}])
    assert texts(opened(path)) == ["one"]
    assert texts(opened(path, text_field="title")) == ["two"]


def test_the_fingerprint_is_of_the_content_not_of_the_place(tmp_path: Path, opened: Callable[..., Corpus]) -> None:
    for name in ("here.txt", "there.txt"):
        (tmp_path / name).write_text("the same")
    assert opened(tmp_path / "here.txt").fingerprint == opened(tmp_path / "there.txt").fingerprint


@pytest.mark.parametrize("victim", ["tokens.bin", "documents.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_a_damaged_cache_is_built_again(tmp_path: Path, victim: str, damage: str) -> None:
    path, cache = tmp_path / "x.txt", tmp_path / "cache"
    path.write_text("words")
    open_corpus([path], cache_dir=cache)
    (folder,) = cache.iterdir()
    if damage == "cut":
        (folder / victim).write_bytes((folder / victim).read_bytes()[:-1])
    elif damage == "empty":
        (folder / victim).write_bytes(b"")
    else:
        (folder / victim).unlink()
    assert texts(open_corpus([path], cache_dir=cache)) == ["words"]
    assert texts(open_corpus([path], cache_dir=cache)) == ["words"]
    assert list(cache.iterdir()) == [folder]


def test_a_build_that_dies_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = tmp_path / "x.txt", tmp_path / "cache"
    path.write_text("words")

    def interrupt(self: ByteTokenizer, texts: Sequence[bytes]) -> list[np.ndarray]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ByteTokenizer, "encode_batch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            open_corpus([path], cache_dir=cache)
    assert not list(cache.iterdir())
    assert texts(open_corpus([path], cache_dir=cache)) == ["words"]


def test_processes_may_race_for_the_cache(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"text": "word " * n} for n in range(200)])
    context = multiprocessing.get_context("spawn")  # as ranks are: each with its own hash seed
    with context.Pool(3) as pool:
        found = pool.map(_open, [str(tmp_path)] * 3, chunksize=1)
    assert len(set(found)) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


def _open(folder: str) -> tuple[str, int]:
    corpus = open_corpus([f"{folder}/x.jsonl"], cache_dir=f"{folder}/cache")
    return corpus.fingerprint, corpus.num_tokens


def test_losing_the_race_is_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = tmp_path / "x.txt", tmp_path / "cache"
    path.write_text("words")
    encode = ByteTokenizer.encode_batch
    started = False
    rival: Corpus | None = None

    def slow(self: ByteTokenizer, texts: Sequence[bytes]) -> list[np.ndarray]:
        nonlocal started, rival
        if not started:
            started = True
            rival = open_corpus([path], cache_dir=cache)  # another process starts and ends meanwhile
        return encode(self, texts)

    monkeypatch.setattr(ByteTokenizer, "encode_batch", slow)
    assert texts(open_corpus([path], cache_dir=cache)) == ["words"]
    assert rival is not None and texts(rival) == ["words"]
    assert len(list(cache.iterdir())) == 1


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.txt"
    path.write_text("words")
    with pytest.raises(UserError, match=r"x\.txt/cache.*data\.cache_dir"):
        open_corpus([path], cache_dir=path / "cache")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device.*data\.cache_dir"):
        open_corpus([path], cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_the_cache_lies_in_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "longhaul" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "longhaul" / "tokens"
