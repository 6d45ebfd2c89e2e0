"""`longhaul bench mixers` and `bench generation`: real layers in processes of their own, results kept and gone on from."""

import json
from pathlib import Path

import pytest

from longhaul.launcher.bench import main
from longhaul.launcher.bench.layer import PIECE, Layer, LayerShape
from longhaul.models.errors import UserError

SMALL = "--width 64 --repeats 2 --threads 1"


def test_steps_of_mixers_beside_softmax(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mixers.json"
    arguments = [*f"mixers --length 96 {SMALL} --json".split(), str(file), "--mixers"]
    assert main([*arguments, "gla"]) == 0
    first = json.loads(file.read_text())["mixers"]
    assert list(first) == ["attention", "gla"]
    for result in first.values():
        assert len(result["steps"]) == 2 and result["memory_gib"] >= 0
        assert result["seconds"] >= result["forward"] > 0
        assert result["tokens_per_second"] == pytest.approx(96 / result["seconds"])
    capsys.readouterr()
    assert main([*arguments, "gla", "s5"]) == 0
    output = capsys.readouterr().out
    assert "3/3 s5" in output and "2/3 gla" not in output, "what is in the file is not measured again"
    second = json.loads(file.read_text())["mixers"]
    assert list(second) == ["attention", "gla", "s5"] and second["gla"] == first["gla"]
    with pytest.raises(UserError, match="another file"):
        main([*arguments, "gla", "--length", "97"])


def test_tokens_of_mixers_beside_softmax(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "generation.json"
    arguments = f"generation --contexts 8 32 --tokens 2 {SMALL} --mixers mamba2 --json".split()
    assert main([*arguments, str(file)]) == 0
    found = json.loads(file.read_text())["mixers"]
    assert found["mamba2"]["8"]["state_bytes"] == found["mamba2"]["32"]["state_bytes"] > 0
    softmax = [found["attention"][context]["state_bytes"] for context in ("8", "32")]
    assert softmax == [8 * 2 * 64 * 4, 32 * 2 * 64 * 4], "keys and values of each token"
    assert "mamba2" in capsys.readouterr().out


def test_a_state_is_filled_piece_by_piece() -> None:
    layer, asked = Layer(LayerShape(mixer="gla", width=64, length=PIECE)), []
    layer.module.register_forward_hook(lambda module, inputs, output: asked.append(inputs[1].documents))
    layer.fill(PIECE + 5)
    layer.tokens(PIECE + 5, 2)
    assert [(documents.num_tokens, documents.first_position) for documents in asked] == [
        (PIECE, 0), (5, PIECE), (1, PIECE + 5), (1, PIECE + 6),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ("mixers --length 0", "--length is 0"),
        ("mixers --width 100", "--width 100"),
        ("mixers --mixers gla mamba9", "no mixer 'mamba9'"),
        ("generation --contexts 0 5", "--contexts holds 0"),
        ("generation --tokens 0", "--tokens is 0"),
    ),
)
def test_impossible_arguments_are_refused(arguments: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(arguments.split())


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text("[1]")
    with pytest.raises(UserError, match="no results of this benchmark"):
        main(["mixers", "--json", str(file)])
