"""`longhaul bench stream`: a tiny run of the command, and its arithmetic. Nothing is said about times."""

import json
from pathlib import Path
from typing import Any

import pytest

from longhaul.launcher.bench import stream
from longhaul.launcher.bench.cli import main
from longhaul.models.errors import UserError

CONFIG = Path(__file__).parents[2] / "configs" / "linear_llama3_1b.yaml"


def test_the_command_measures_and_judges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    arguments = "--lengths 80 --chunk 32 --unstreamed 40 --pairs 1 --layers 1 --width 32 --heads 2 --vocab 20 --threads 1"
    assert main(["stream", *arguments.split(), "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    pairs, (row,) = report["pairs"], report["results"]
    assert pairs["gradient_error"] < 1e-5 and len(pairs["speeds"]) == 1
    losses = [steps[0]["loss"] for steps in pairs["steps"].values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    state = 2 * 16 * 16
    assert (row["length"], row["chunk"], row["border_elements"]) == (80, 32, 2 * state)
    assert row["peak_gib"] > row["before_gib"] > 0.01
    output = capsys.readouterr().out
    assert "not measured" in output and "replay 3 of 3 chunks" in output


def test_aims_are_held_against_what_was_measured() -> None:
    def row(length: int, memory: float, speed: float) -> dict[str, Any]:
        return {"length": length, "grown_gib": memory, "tokens_per_second": speed}

    # The shortest length ran twice: its mean counts.
    results = [row(10, 1.0, 90.0), row(20, 1.05, 100.0), row(40, 1.21, 95.0), row(10, 1.2, 110.0)]
    found = stream.verdicts(results, {"speed": 0.69})
    assert [(round(value, 3), reached) for value, _, reached in found.values()] == [(1.1, True), (0.95, True), (0.69, False)]
    assert [value for value, *_ in stream.verdicts(results[:1], None).values()] == [None] * 3


def test_the_model_of_a_file_may_have_fewer_layers_only() -> None:
    config = stream.model_config(stream.parse(["--config", str(CONFIG), "--layers", "2"]))
    assert (config.num_layers, config.hidden_size) == (2, 2048)
    with pytest.raises(UserError, match=r"--width 64 is of the small model, but --config .*1b\.yaml names another"):
        stream.model_config(stream.parse(["--config", str(CONFIG), "--width", "64"]))


@pytest.mark.parametrize("arguments", (["--chunk", "0"], ["--pairs", "0"], ["--lengths", "5", "0"], ["--unstreamed", "-1"]))
def test_impossible_numbers_are_refused(arguments: list[str]) -> None:
    with pytest.raises(UserError, match=f"{arguments[0]} .*{arguments[-1]}: give at least"):
        stream.parse(arguments)
