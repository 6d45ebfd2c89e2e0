"""Bytes and tokenizer.json files."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from longhaul.launcher.data import ByteTokenizer, FileTokenizer, Tokenizer, open_corpus, open_tokenizer
from longhaul.models.errors import UserError


def write_tokenizer(path: Path, special: tuple[str, ...] = (), greedy: bool = False) -> Path:
    """A character tokenizer of a, b, c and space; `greedy` ones also truncate, pad and add tokens of a template."""
    vocabulary = {"[UNK]": 0, "a": 1, "b": 2, "c": 3, " ": 4}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    made.add_special_tokens(list(special))
    if greedy:
        made.enable_truncation(2)
        made.enable_padding(length=9)
        made.post_processor = tokenizers.processors.TemplateProcessing(single="[UNK] $A", special_tokens=[("[UNK]", 0)])
    made.save(str(path))
    return path


def test_bytes_round_trip() -> None:
    tokenizer: Tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.needs_utf8) == (257, 256, False)
    text = "grün ☃\n\0"
    assert tokenizer.encode(text).tolist() == list(text.encode())
    assert tokenizer.encode(text.encode()).tolist() == list(text.encode())
    assert tokenizer.encode(text).dtype == np.int64
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([104, 256, 105, 260, -1, 0xE2]) == "hi\ufffd"
    assert [ids.tolist() for ids in tokenizer.encode_batch([b"a", b"", b"\xff"])] == [[97], [], [255]]


def test_a_file_round_trip(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json")
    tokenizer: Tokenizer = FileTokenizer(path)
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.needs_utf8) == (6, 5, True)  # no name for it: a new id
    assert tokenizer.encode("ab c").tolist() == [1, 2, 4, 3] == tokenizer.encode(b"ab c").tolist()
    assert [ids.tolist() for ids in tokenizer.encode_batch([b"a", b"", b"cb"])] == [[1], [], [3, 2]]
    assert tokenizer.decode([1, 2, 4, 3, 5, 99, -1]) == "ab c"
    assert FileTokenizer(tmp_path).fingerprint == tokenizer.fingerprint == open_tokenizer(str(path)).fingerprint
    assert isinstance(open_tokenizer("byte"), ByteTokenizer)


def test_nothing_is_cut_padded_or_added(tmp_path: Path) -> None:
    tokenizer = FileTokenizer(write_tokenizer(tmp_path / "tokenizer.json", greedy=True))
    assert tokenizer.encode("abcabc").tolist() == [1, 2, 3, 1, 2, 3]
    assert [ids.tolist() for ids in tokenizer.encode_batch([b"abcabc", b"a"])] == [[1, 2, 3, 1, 2, 3], [1]]


def test_the_end_of_document_token(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json", special=("<stop>", "</s>"))
    plain = FileTokenizer(path)
    assert (plain.eod_id, plain.vocab_size) == (6, 7)  # </s> by its usual name
    assert 6 not in plain.encode("a</s>b")  # a document cannot end itself
    for eos in ("<stop>", {"content": "<stop>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        assert FileTokenizer(path).eod_id == 5
        assert FileTokenizer(path).fingerprint != plain.fingerprint
    for useless in ('{"eos_token": "<not there>"}', '{"eos_token": null}', "[]", "{"):
        (tmp_path / "tokenizer_config.json").write_text(useless)
        assert FileTokenizer(path).eod_id == 6


def test_documents_of_a_file_tokenizer(tmp_path: Path) -> None:
    tokenizer = FileTokenizer(write_tokenizer(tmp_path / "tokenizer.json"))
    (tmp_path / "x.txt").write_text("abc")
    corpus = open_corpus([tmp_path / "x.txt"], tokenizer=tokenizer, cache_dir=tmp_path / "cache")
    assert corpus.document(0).tolist() == [1, 2, 3, 5] and corpus.tokens.dtype == np.uint8
    as_bytes = open_corpus([tmp_path / "x.txt"], cache_dir=tmp_path / "cache")
    assert as_bytes.tokens.dtype == np.uint16
    assert as_bytes.keys.tolist() == corpus.keys.tolist() and as_bytes.fingerprint != corpus.fingerprint


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"gpt2.*No such file.*tokenizer\.json"):
        open_tokenizer("gpt2")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(UserError, match=r"broken\.json is not a Hugging Face tokenizer\.json"):
        FileTokenizer(tmp_path / "broken.json")
    (tmp_path / "binary.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"binary\.json is not"):
        FileTokenizer(tmp_path / "binary.json")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({}, unk_token="x")).save(str(tmp_path / "void.json"))
    with pytest.raises(UserError, match=r"void\.json has an empty vocabulary"):
        FileTokenizer(tmp_path / "void.json")
    path = write_tokenizer(tmp_path / "tokenizer.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"needs the package tokenizers.*longhaul\[data\]"):
        FileTokenizer(path)
