"""Files on disk to documents, in an order that does not depend on the machine."""

from __future__ import annotations

import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

from longhaul.models.errors import UserError

from .extras import require

PYTHON_STDLIB = "python-stdlib"
_KINDS = {
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".parquet": "parquet",
}
_ACCEPTED = ", ".join(_KINDS)
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Source:
    """One file of documents."""

    path: Path
    kind: str
    skip_undecodable: bool = False
    """Leave the file out, whatever `on_bad_document` says, if it is not UTF-8 (broken on purpose, as test data is)."""


@dataclass
class BadDocuments:
    """What to do with a document that cannot be read, and how many there were."""

    on_bad_document: str = "error"
    skipped: int = 0
    first: str | None = None

    def add(self, problem: str) -> None:
        """Report one: `problem` is the start of a sentence that names the file and the place in it."""
        if self.on_bad_document == "error":
            raise UserError(f"{problem}: mend it, or set data.on_bad_document to skip to leave such documents out.")
        self.skip(problem)

    def skip(self, problem: str) -> None:
        """Count one that is left out in either mode."""
        self.skipped += 1
        self.first = self.first or problem


@dataclass(frozen=True)
class Document:
    """The bytes of one document and where they were read."""

    text: bytes
    where: str = field(compare=False)


def find_sources(paths: Sequence[str | Path]) -> list[Source]:
    """The files under `paths`, in the order given and inside a folder by relative path; each file once.

    Folders are searched for the accepted suffixes; hidden names and `__pycache__` are passed over.

    Raises:
        UserError: a path is missing, holds nothing that can be read, or has a suffix nobody reads.
    """
    found: dict[str, Source] = {}
    for path in paths or (PYTHON_STDLIB,):
        for source in _stdlib() if str(path) == PYTHON_STDLIB else _under(Path(path).expanduser()):
            found.setdefault(os.path.realpath(source.path), source)
    return list(found.values())


def _stdlib() -> list[Source]:
    root = Path(sysconfig.get_path("stdlib"))
    files = _walk(root, skip=("site-packages", "dist-packages"))
    python = (root / name for name in files if name.endswith(".py"))
    # A distribution may leave links to files it did not install; nobody could mend that for a training run.
    sources = [Source(path, "text", skip_undecodable=True) for path in python if path.is_file()]
    if not sources:
        raise UserError(
            f"The Python installation at {root} has no source files to train on: set data.paths to your own documents."
        )
    return sources


def _under(path: Path) -> list[Source]:
    if path.is_dir():
        pairs = ((path / name, _kind(name)) for name in _walk(path))
        sources = [Source(file, kind) for file, kind in pairs if kind is not None]
        if not sources:
            raise UserError(f"The folder {path} of data.paths has no documents: put {_ACCEPTED} files there.")
        return sources
    if not path.exists():
        raise UserError(f"The path {path} of data.paths does not exist: correct it, or leave data.paths empty.")
    kind = _kind(path.name)
    if kind is None:
        raise UserError(f"The file {path} of data.paths is of no known kind: give files ending in {_ACCEPTED}.")
    return [Source(path, kind)]


def _kind(name: str) -> str | None:
    return next((kind for suffix, kind in _KINDS.items() if name.lower().endswith(suffix)), None)


def _walk(root: Path, skip: Sequence[str] = ()) -> list[str]:
    """Relative paths of the files under `root`, sorted; names in `skip` and hidden ones are left out."""
    names = []
    for folder, subfolders, files in os.walk(root, onerror=_refuse):
        subfolders[:] = [s for s in subfolders if not s.startswith(".") and s != "__pycache__" and s not in skip]
        relative = Path(folder).relative_to(root)
        names += [(relative / file).as_posix() for file in files if not file.startswith(".")]
    return sorted(names)


def _refuse(error: OSError) -> NoReturn:
    raise UserError(
        f"Cannot read {error.filename} of data.paths ({error.strerror}): make it readable or leave it out."
    ) from None


def read_documents(source: Source, text_field: str, bad: BadDocuments) -> Iterator[Document]:
    """The documents of one file, in order, empty ones included.

    Args:
        source: the file.
        text_field: where a .jsonl line or a .parquet row keeps its text.
        bad: told of every document that cannot be read.

    Raises:
        UserError: the file cannot be read, or `bad` refuses a document.
    """
    readers = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}
    try:
        yield from readers[source.kind](source, text_field, bad)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"The file {source.path} is damaged ({error}): replace it or take it out of data.paths."
        ) from None
    except OSError as error:
        error.filename = error.filename or str(source.path)
        _refuse(error)


def _read_text(source: Source, text_field: str, bad: BadDocuments) -> Iterator[Document]:
    text = source.path.read_bytes()
    if source.skip_undecodable and (offset := broken_utf8_at(text)) is not None:
        bad.skip(f"{source.path} is not UTF-8 at byte {offset}")
    else:
        yield Document(text, str(source.path))


def _read_jsonl(source: Source, text_field: str, bad: BadDocuments) -> Iterator[Document]:
    opener = gzip.open if source.path.name.lower().endswith(".gz") else open
    with cast(BinaryIO, opener(source.path, "rb")) as lines:
        for number, line in enumerate(lines, start=1):
            line = (line.removeprefix(_BOM) if number == 1 else line).strip()
            where = f"{source.path} line {number}"
            if not line:
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                bad.add(f"{where} is not UTF-8 at byte {error.start}")
                continue
            except (ValueError, RecursionError) as error:
                bad.add(f"{where} is not JSON ({error})")
                continue
            text = row.get(text_field) if isinstance(row, dict) else None
            if not isinstance(text, str):
                bad.add(f"{where} has no text in the field {text_field!r} (data.text_field)")
                continue
            try:
                yield Document(text.encode("utf-8"), where)
            except UnicodeEncodeError as error:
                bad.add(f"{where} has half a surrogate pair at character {error.start} of {text_field!r}")


def _read_parquet(source: Source, text_field: str, bad: BadDocuments) -> Iterator[Document]:
    parquet = require("pyarrow.parquet", str(source.path))
    arrow = require("pyarrow", str(source.path))
    row = 0
    try:
        with parquet.ParquetFile(source.path) as file:
            schema = file.schema_arrow
            if text_field not in schema.names:
                raise UserError(
                    f"{source.path} has no column {text_field!r}: set data.text_field to one of "
                    f"{', '.join(schema.names)}."
                )
            kind = schema.field(text_field).type
            if kind not in (arrow.string(), arrow.large_string()):
                raise UserError(
                    f"The column {text_field!r} of {source.path} holds {kind}, not strings: set data.text_field to a "
                    "column of strings."
                )
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                # As bytes, so that broken UTF-8 is one bad document rather than a failed batch.
                for text in batch.column(0).cast(arrow.large_binary()).to_pylist():
                    row += 1
                    where = f"{source.path} row {row}"
                    if text is None:
                        bad.add(f"{where} has no text in the column {text_field!r} (data.text_field)")
                    else:
                        yield Document(text, where)
    except (arrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"The file {source.path} is not readable as parquet ({reason}): replace it or take it out of data.paths."
        ) from None


def broken_utf8_at(text: bytes) -> int | None:
    """Offset of the first byte that is not UTF-8; None if all are."""
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return None
