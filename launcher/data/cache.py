"""Tokens on disk: written once, mapped into memory by every process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from longhaul.models.errors import UserError

_TOKENS, _DOCUMENTS, _META = "tokens.bin", "documents.npy", "meta.json"


def default_cache_dir() -> Path:
    """longhaul/tokens in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "longhaul" / "tokens"


class TokenWriter:
    """Writes documents to a folder, one after another, holding none of them in memory.

    Args:
        folder: where the files go.
        dtype: type that holds every token id.
    """

    def __init__(self, folder: Path, dtype: np.dtype[Any]) -> None:
        self._folder = folder
        self._dtype = dtype
        self._file = (folder / _TOKENS).open("wb")
        self._lengths: list[int] = []
        self._keys: list[int] = []

    def add(self, tokens: np.ndarray, key: int) -> None:
        """Append one document of tokens [n] that is identified by `key`, an unsigned 64-bit number."""
        self._file.write(tokens.astype(self._dtype).tobytes())
        self._lengths.append(len(tokens))
        self._keys.append(key)

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()

    def finish(self, **facts: Any) -> None:
        """Write what describes the tokens; `facts` are kept with them."""
        self._file.flush()
        os.fsync(self._file.fileno())
        np.save(self._folder / _DOCUMENTS, np.asarray([self._lengths, self._keys], dtype=np.uint64))
        meta = {"dtype": self._dtype.str, "tokens": sum(self._lengths), **facts}
        (self._folder / _META).write_text(json.dumps(meta, indent=1))


def read_tokens(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]] | None:
    """Tokens (mapped, read only), document lengths, keys and facts; None if the folder is missing or damaged."""
    try:
        meta = json.loads((folder / _META).read_bytes())
        lengths, keys = np.load(folder / _DOCUMENTS)
        # Refuses a file that is shorter than its shape.
        tokens = np.memmap(folder / _TOKENS, dtype=np.dtype(meta["dtype"]), mode="r", shape=(meta["tokens"],))
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
    ):  # a damaged cache is built again, it is nobody's mistake
        return None
    return tokens, lengths.astype(np.int64), keys, meta


def fill_cache(cache_dir: Path, key: str, write: Callable[[Path], None]) -> Path:
    """The folder of `key`, filled by `write` unless it is there already.

    `write` fills a folder of its own, renamed into place when whole: processes may race, and one killed half way
    leaves nothing that another would take for tokens.

    Raises:
        UserError: the cache cannot be written, for want of space or of permission.
    """
    target = cache_dir / key
    if read_tokens(target) is not None:
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"building-{key[:8]}-", dir=cache_dir))
        try:
            whole = scratch / "whole"
            whole.mkdir()
            write(whole)
            _move_into_place(whole, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"Cannot write the token cache in {cache_dir} ({error.strerror or error}): make room there or set "
            "data.cache_dir to a folder that can be written."
        ) from None
    return target


def _move_into_place(whole: Path, target: Path) -> None:
    if target.exists() and read_tokens(target) is None:
        with contextlib.suppress(FileNotFoundError):  # another process moved the damaged one away first
            os.rename(target, whole.parent / "damaged")
    try:
        os.rename(whole, target)
    except OSError:
        if read_tokens(target) is None:
            raise
        # Another process built the same tokens first: these are not needed.
