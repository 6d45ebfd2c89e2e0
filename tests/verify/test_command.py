"""`longhaul verify` as a person runs it: what it prints and writes, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longhaul.launcher.cli import main
from longhaul.launcher.verify.cells import AXES

NARROW = ("--engine", "ring", "--layout", "contiguous", "--documents", "mixed", "--stream", "continued", "--dtype", "fp64")


def verify(*arguments: str) -> int:
    return main(["verify", "--device", "cpu", *arguments])


def test_a_registered_mixer_passes_and_is_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document, kept = tmp_path / "out.json", tmp_path / "kept.jsonl"
    arguments = ("--mixer", "mamba2", *NARROW, "--ranks", "2", "--results", str(kept), "--json", str(document))
    assert verify(*arguments) == 0
    assert "1 cells; about" in capsys.readouterr().out
    found: dict[str, Any] = json.loads(document.read_text())
    assert (found["passed"], found["failed"], found["refused"]) == (1, 0, 0)
    assert set(found["cells"][0]["cell"]) == set(AXES) and 0 < found["cells"][0]["worst"] < 1e-10
    with kept.open("a") as file:
        file.write('{"fingerprint": "half a li')  # what a kill in mid-write leaves
    assert verify(*arguments) == 0
    assert "1 of them finished before" in capsys.readouterr().out
    assert len(kept.read_text().splitlines()) == 2


@pytest.mark.parametrize(("name", "code"), [("Decay", 0), ("Alone", 1)])
def test_a_module_of_ones_own(name: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "out.json"
    assert verify("--module", f"tests.verify.mixers:{name}", *NARROW, "--ranks", "2", "--json", str(document)) == code
    text = capsys.readouterr().out
    assert "1 failed" in text or not code, text
    if code:
        (cell,) = json.loads(document.read_text())["cells"]
        assert {"tensor", "rank", "value", "limit"} == set(cell["failures"][0])
        assert "failed: mixer tests.verify.mixers:Alone" in text and "output, rank 1" in text


def test_the_cell_after_a_broken_rank_has_new_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "out.json"
    narrow = (*NARROW[:4], "empty_last", *NARROW[4:])
    assert verify("--module", "tests.verify.mixers:Broken", *narrow, "--ranks", "2", "--json", str(document)) == 1
    verdicts = {cell["cell"]["layout"]: cell for cell in json.loads(document.read_text())["cells"]}
    # Where the last rank is empty its part begins at the end of the stream, so it fails there too, each with its own pool.
    assert {verdict["status"] for verdict in verdicts.values()} == {"failed"} and len(verdicts) == 2
    assert all("rank 1" in verdict["message"] and "broken on purpose" in verdict["message"] for verdict in verdicts.values())
    assert "broken on purpose" in capsys.readouterr().out


def test_pools_share_the_cells(tmp_path: Path) -> None:
    document, kept = tmp_path / "out.json", tmp_path / "kept.jsonl"
    narrow = ("--documents", "mixed", "one", "edge", "--stream", "kept", "--dtype", "fp64", "--layout", "contiguous")
    arguments = ("--mixer", "retention", "--engine", "ring", *narrow, "--ranks", "1", "2", "--pools", "2", "--results", str(kept))
    assert verify(*arguments, "--all", "--json", str(document)) == 0
    found = json.loads(document.read_text())
    keys = [(cell["cell"]["ranks"], cell["cell"]["documents"]) for cell in found["cells"]]
    assert len(set(keys)) == len(keys) == found["passed"] >= 2 and len(kept.read_text().splitlines()) == len(keys)


def test_a_broken_rank_ends_one_cell_of_its_pool(tmp_path: Path) -> None:
    document = tmp_path / "out.json"
    narrow = ("--engine", "ring", "--layout", "contiguous", "--documents", "mixed", "one", "--stream", "fresh", "--dtype", "fp64")
    arguments = ("--module", "tests.verify.mixers:Broken", *narrow, "--ranks", "2", "--pools", "2")
    assert verify(*arguments, "--json", str(document)) == 1
    verdicts = json.loads(document.read_text())["cells"]
    assert verdicts and all("broken on purpose" in verdict["message"] for verdict in verdicts)


def test_topologies_are_narrowed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, document = tmp_path / "kept.jsonl", tmp_path / "out.json"
    arguments = ("--topologies", "--model", "encoder", "--topology", "1", "pp2", "--results", str(kept), "--json", str(document))
    assert verify(*arguments) == 0
    found = json.loads(document.read_text())
    assert (found["passed"], found["failed"], found["refused"]) == (1, 0, 1)
    assert verify(*arguments) == 0
    assert "2 of them finished before" in capsys.readouterr().out and len(kept.read_text().splitlines()) == 2


def test_bytes_equal_the_formulas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "bytes.json"
    assert verify("--bytes", "--ranks", "2", "--engine", "ring", "--json", str(document)) == 0
    rows = json.loads(document.read_text())["engines"]
    assert {row["kind"] for row in rows} == {"exchange", "attention"}
    assert all(row["equal"] and row["cases"] and row["bytes"] == row["bytes_formula"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--mixer", "mamba7"), "--mixer 'mamba7' is not known"),
        (("--ranks", "0"), "--ranks 0 must lie between"),
        (("--pools", "0"), "--pools 0 must be at least 1"),
        (("--module", "nowhere.at.all:Mixer"), "cannot be imported"),
        (("--module", "tests.verify.mixers"), "names no class"),
        (("--module", "tests.verify.mixers:Nothing"), "has no 'Nothing'"),
        (("--module", "tests.verify.mixers:NotAModule"), "no class of torch.nn.Module"),
        (("--bytes", "--engine", "auto"), "no formula of its own"),
        (("--mixer", "attention", "--engine", "log_scan"), "No cell is left"),
        (("--topologies", "--model", "gpt"), "--model 'gpt' is not known"),
        (("--topologies", "--topology", "dp2", "--model", "encoder", "--backend", "hsdp"), "No case is left"),
        (("--topologies", "--mixer", "mamba2"), "--mixer is of the matrix of engines"),
        (("--topologies", "--model", "mom", "--markdown", "table.md"), "ask for nothing narrower"),
        (("--backend", "ddp"), "--backend is of --topologies"),
    ],
)
def test_mistakes_end_in_one_sentence(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(*arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1


def test_help_shows_a_module_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        verify("--help")
    assert stop.value.code == 0 and "longhaul verify --module mine:Mean" in capsys.readouterr().out
