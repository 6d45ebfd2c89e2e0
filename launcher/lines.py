"""Results on disk: one line of JSON each, appended in one write.

An interrupted run leaves whole lines (or one broken last line, which is passed over), so a rerun goes on where it ended. A
line counts only for the program that wrote it: it names a fingerprint of the sources.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from longhaul.models.errors import UserError


def fingerprint_of(roots: Iterable[Path]) -> str:
    """Of source files, and of all below folders, by content and place; and of torch."""
    digest = hashlib.sha256(torch.__version__.encode())
    for root in roots:
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            digest.update(path.relative_to(root.parent).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


class LinesFile:
    """Results as JSON lines.

    Args:
        path: made when the first line comes.
        fingerprint: of the program.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint

    def lines(self) -> Iterator[dict[str, Any]]:
        """What this program wrote, in order."""
        if not self.path.exists():
            return
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--results {self.path} cannot be read ({error}): give another file.") from None
        for line in lines:
            try:
                fields = json.loads(line)
            except json.JSONDecodeError:
                continue  # a broken line of an interrupted write
            if isinstance(fields, dict) and fields.get("fingerprint") == self.fingerprint:
                yield fields

    def write(self, fields: Mapping[str, Any]) -> None:
        """Add a line, whole or not at all."""
        line = json.dumps({"fingerprint": self.fingerprint, **fields})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                size = os.fstat(handle).st_size
                broken = size and os.pread(handle, 1, size - 1) != b"\n"
                os.write(handle, (("\n" if broken else "") + line + "\n").encode())
            finally:
                os.close(handle)
        except OSError as error:
            raise UserError(f"--results {self.path} cannot be written ({error.strerror}): give another file.") from None
