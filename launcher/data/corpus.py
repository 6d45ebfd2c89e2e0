"""Documents as one array of tokens with boundaries.

Letters: `D` documents.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from longhaul.models.errors import UserError

from .cache import TokenWriter, default_cache_dir, fill_cache, read_tokens
from .sources import BadDocuments, Source, broken_utf8_at, find_sources, read_documents
from .tokenizer import ByteTokenizer, Tokenizer

_FORMAT = 1  # of the cache and of what is written to it; a change here builds every cache again
_BATCH_BYTES = 4 << 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents that share one token array; `select` makes a smaller corpus over the same array.

    Every document ends with the end-of-document token, so none is empty.
    """

    tokens: np.ndarray
    """All tokens, of the documents here and of others; read only, usually mapped from a file."""
    starts: np.ndarray
    """int64 [D]: where each document begins in `tokens`."""
    lengths: np.ndarray
    """int64 [D]: its tokens, the end-of-document token included."""
    keys: np.ndarray
    """uint64 [D]: a hash of the document's text; equal texts have equal keys, whatever the tokenizer."""
    fingerprint: str
    """Names content and tokenizer, not the place on disk: equal after a folder is moved, different after an edit."""
    empty_documents: int = 0
    """Left out because they had no text."""
    skipped_documents: int = 0
    """Left out because they could not be read."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of the documents here."""
        return int(self.lengths.sum())

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document, its end-of-document token last."""
        start = self.starts[index]
        return self.tokens[start : start + self.lengths[index]]

    def select(self, indices: np.ndarray) -> Corpus:
        """The documents `indices`, in that order."""
        return replace(
            self,
            starts=self.starts[indices],
            lengths=self.lengths[indices],
            keys=self.keys[indices],
            fingerprint=corpus_fingerprint(self.keys[indices], self.lengths[indices], self.fingerprint),
        )


def corpus_fingerprint(keys: np.ndarray, lengths: np.ndarray, base: str) -> str:
    """Digest of documents in their order; `base` says how they became tokens."""
    digest = hashlib.sha256(base.encode())
    digest.update(np.ascontiguousarray(keys, dtype="<u8").tobytes())
    digest.update(np.ascontiguousarray(lengths, dtype="<i8").tobytes())
    return digest.hexdigest()[:32]


def open_corpus(
    paths: Sequence[str | Path] = (),
    text_field: str = "text",
    tokenizer: Tokenizer | None = None,
    *,
    on_bad_document: str = "error",
    cache_dir: str | Path | None = None,
) -> Corpus:
    """Read documents, tokenise them once into a cache, and map the tokens.

    Any process may call this at any time; a job saves work by letting one rank of a machine call it first.

    Args:
        paths: files and folders; none, or the word `python-stdlib`, is the source of Python's standard library.
        text_field: field of a .jsonl line or column of a .parquet file that holds the text.
        tokenizer: bytes by default.
        on_bad_document: `error` or `skip`.
        cache_dir: where tokens are kept; by default in the user's cache folder.

    Raises:
        UserError: a path is missing, nothing is there to train on, a document cannot be read, the disk is full.
    """
    tokenizer = tokenizer or ByteTokenizer()
    sources = find_sources(paths)
    key = _cache_key(sources, text_field, tokenizer, on_bad_document)
    directory = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()

    def write(folder: Path) -> None:
        _tokenise(folder, sources, text_field, tokenizer, BadDocuments(on_bad_document))

    folder = fill_cache(directory, key, write)
    found = read_tokens(folder)
    if found is None:
        raise UserError(f"The token cache {folder} changed while it was opened: run again, or delete that folder.")
    tokens, lengths, keys, facts = found
    return Corpus(
        tokens=tokens,
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        keys=keys,
        fingerprint=corpus_fingerprint(keys, lengths, tokenizer.fingerprint),
        empty_documents=facts["empty_documents"],
        skipped_documents=facts["skipped_documents"],
    )


def _cache_key(sources: list[Source], text_field: str, tokenizer: Tokenizer, on_bad_document: str) -> str:
    """Changes with anything that may change the tokens, as far as `stat` can tell."""
    files = []
    for source in sources:
        try:
            stat = source.path.stat()
        except OSError as error:
            raise UserError(
                f"Cannot read {source.path} of data.paths ({error.strerror}): mend it or leave it out."
            ) from None
        files.append([str(source.path.absolute()), source.skip_undecodable, stat.st_size, stat.st_mtime_ns])
    facts = [_FORMAT, tokenizer.fingerprint, text_field, on_bad_document, files]
    return hashlib.sha256(json.dumps(facts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _tokenise(folder: Path, sources: list[Source], text_field: str, tokenizer: Tokenizer, bad: BadDocuments) -> None:
    """Write the tokens of every document of `sources` to `folder`."""
    eod = np.asarray([tokenizer.eod_id])
    documents = empty = 0
    with TokenWriter(folder, _token_dtype(tokenizer.vocab_size)) as writer:
        for texts in _batches(sources, text_field, tokenizer, bad):
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                if len(ids):
                    writer.add(np.concatenate([ids, eod]), _text_key(text))
                    documents += 1
                else:
                    empty += 1
        if not documents:
            raise UserError(
                f"No document to train on in {_names(sources)}: {empty} empty and {bad.skipped} unreadable ones were "
                "left out; give data.paths documents with text."
            )
        writer.finish(empty_documents=empty, skipped_documents=bad.skipped)
    if bad.skipped:
        logger.warning("%d documents could not be read and were left out; the first: %s", bad.skipped, bad.first)
    logger.info("tokenised %d documents of %d files (%d empty)", documents, len(sources), empty)


def _batches(sources: list[Source], text_field: str, tokenizer: Tokenizer, bad: BadDocuments) -> Iterator[list[bytes]]:
    """Readable documents in order, some megabytes at a time: tokenizers are fast on many at once."""
    texts: list[bytes] = []
    size = 0
    for source in sources:
        for document in read_documents(source, text_field, bad):
            if tokenizer.needs_utf8 and (offset := broken_utf8_at(document.text)) is not None:
                bad.add(f"{document.where} is not UTF-8 at byte {offset}")
                continue
            texts.append(document.text)
            size += len(document.text)
            if size >= _BATCH_BYTES:
                yield texts
                texts, size = [], 0
    yield texts


def _names(sources: list[Source]) -> str:
    more = f" and {len(sources) - 3} other files" if len(sources) > 3 else ""
    return ", ".join(str(source.path) for source in sources[:3]) + more


def _text_key(text: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds every id."""
    return np.min_scalar_type(vocab_size - 1)


@dataclass(frozen=True)
class CorpusSummary:
    """How much there is, and how long documents are; lengths in tokens."""

    documents: int
    tokens: int
    length_p50: int
    length_p90: int
    length_p99: int
    length_max: int
    empty_documents: int
    skipped_documents: int

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents, {self.tokens:,} tokens; length p50 {self.length_p50:,}, "
            f"p90 {self.length_p90:,}, p99 {self.length_p99:,}, max {self.length_max:,}; "
            f"left out: {self.empty_documents:,} empty, {self.skipped_documents:,} unreadable"
        )


def describe(corpus: Corpus) -> CorpusSummary:
    """Sizes for the log; percentiles are lengths of actual documents."""
    p50, p90, p99, longest = np.percentile(corpus.lengths, [50, 90, 99, 100], method="nearest").tolist()
    return CorpusSummary(
        documents=len(corpus),
        tokens=corpus.num_tokens,
        length_p50=int(p50),
        length_p90=int(p90),
        length_p99=int(p99),
        length_max=int(longest),
        empty_documents=corpus.empty_documents,
        skipped_documents=corpus.skipped_documents,
    )
