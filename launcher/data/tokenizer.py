"""Text to token ids and back: raw bytes, or a Hugging Face tokenizer.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from longhaul.models.errors import UserError

from .extras import require

# Names under which published tokenizers keep their end-of-document token, most specific first; used only where no
# tokenizer_config.json beside the file says which it is.
_EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|endofdocument|>", "</s>", "<eos>", "<|eos|>", "[EOS]")


class Tokenizer(Protocol):
    """What the rest of the data side asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, the end-of-document token included."""

    @property
    def eod_id(self) -> int:
        """Id of the end-of-document token, which `encode` never adds."""

    @property
    def fingerprint(self) -> str:
        """Equal exactly when two tokenizers give equal ids, on any machine."""

    @property
    def needs_utf8(self) -> bool:
        """Whether a document must be valid UTF-8 to be encoded."""

    def encode(self, text: bytes | str) -> np.ndarray:
        """Ids of one text, int64 [tokens]."""

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of each text."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; the end-of-document token and unknown ids vanish, broken UTF-8 becomes U+FFFD."""


class ByteTokenizer:
    """A token is a byte; 256 ends a document."""

    vocab_size = 257
    eod_id = 256
    fingerprint = "byte-257"
    needs_utf8 = False

    def encode(self, text: bytes | str) -> np.ndarray:
        data = text.encode("utf-8") if isinstance(text, str) else text
        return np.frombuffer(data, dtype=np.uint8).astype(np.int64)

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(text, dtype=np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids if 0 <= int(i) < 256).decode("utf-8", errors="replace")


class FileTokenizer:
    """A Hugging Face `tokenizer.json`, through the `tokenizers` package.

    Only the text is encoded: no template adds special tokens, a special token spelt out in a document is ordinary text,
    and truncation or padding stored in the file is switched off, since nothing may be dropped silently.

    Args:
        path: the file, or the folder that holds `tokenizer.json`.

    Raises:
        UserError: the file or the package is missing, or the file is no tokenizer.
    """

    needs_utf8 = True

    def __init__(self, path: str | Path) -> None:
        file = Path(path).expanduser()
        if file.is_dir():
            file = file / "tokenizer.json"
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(
                f"Cannot read the tokenizer file {file} ({error.strerror}): set data.tokenizer to byte or to the path "
                "of a Hugging Face tokenizer.json."
            ) from None
        tokenizers = require("tokenizers", f"the tokenizer file {file}")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the package raises bare Exception for a file it cannot parse
            raise UserError(
                f"{file} is not a Hugging Face tokenizer.json ({error}): set data.tokenizer to byte or to such a file."
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError(f"The tokenizer file {file} has an empty vocabulary: set data.tokenizer to another file.")
        size = max(vocabulary.values()) + 1
        name = _eod_name(file, vocabulary)
        self.eod_id = size if name is None else vocabulary[name]
        self.vocab_size = max(size, self.eod_id + 1)
        self.fingerprint = f"file-{hashlib.sha256(content).hexdigest()[:32]}-{self.eod_id}"

    def encode(self, text: bytes | str) -> np.ndarray:
        string = text.decode("utf-8") if isinstance(text, bytes) else text
        return np.asarray(self._tokenizer.encode(string, add_special_tokens=False).ids, dtype=np.int64)

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        strings = [text.decode("utf-8") for text in texts]
        encodings = self._tokenizer.encode_batch_fast(strings, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        known = [int(i) for i in ids if 0 <= int(i) < self.vocab_size and int(i) != self.eod_id]
        text: str = self._tokenizer.decode(known, skip_special_tokens=False)
        return text


def _eod_name(file: Path, vocabulary: dict[str, int]) -> str | None:
    """The token that ends documents: what the configuration beside the file says, else a usual name, else None."""
    try:
        eos = json.loads((file.parent / "tokenizer_config.json").read_bytes()).get("eos_token")
    except (OSError, ValueError, AttributeError):
        eos = None  # the file beside it is optional, and only a hint
    if isinstance(eos, dict):
        eos = eos.get("content")
    return next((name for name in (eos, *_EOD_NAMES) if isinstance(name, str) and name in vocabulary), None)


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: `byte`, or a path."""
    return ByteTokenizer() if name == "byte" else FileTokenizer(name)
