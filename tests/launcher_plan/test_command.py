"""`longhaul plan` on tiny steps: what it prints is the planner's plan."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from longhaul.launcher import cli
from longhaul.launcher.plan import explain, picture
from longhaul.launcher.plan.compare import static_times
from longhaul.launcher.plan.costs import published_model
from longhaul.launcher.plan.inputs import make_cluster, read_cluster
from longhaul.parallel.planner import Plan, plan
from tests.launcher_plan.files import LENGTHS, cluster_file, lengths_file

TINY = ["--model.hidden_size", "32", "--model.num_heads", "2", "--model.mamba2.state_size", "8", "--model.mamba2.head_dim", "16"]


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def step(folder: Path) -> list[str]:
    return ["plan", "--published", "7B", "--cluster", cluster_file(folder), "--lengths", lengths_file(folder)]


def made_for(folder: Path) -> Plan:
    model = published_model("7B", 1.0, None, "sum")
    return plan(LENGTHS, make_cluster(read_cluster(cluster_file(folder)), model), model)


def test_json_is_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*step(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    made = made_for(tmp_path)
    back = explain.from_dict(found["plan"])
    assert back == made and back.candidates == made.candidates
    assert found["plan"]["gap"] == made.gap
    assert found["lengths"] == LENGTHS and found["ranks"] == 8 and found["advice"]
    times = {int(degree): seconds for degree, seconds in found["static"]["seconds"].items()}
    assert min(times.values()) == times[found["static"]["best"]] >= made.time


def test_tables_say_what_the_plan_says(tmp_path: Path, capsys: pytest.CaptureFixture[str], wide: None) -> None:
    assert cli.main(step(tmp_path)) == 0
    out = capsys.readouterr().out
    made = made_for(tmp_path)
    model = published_model("7B", 1.0, None, "sum")
    static = static_times(LENGTHS, make_cluster(read_cluster(cluster_file(tmp_path)), model), model)
    for said in (
        f"{made.time:.4g}", f"{made.bound:.4g}", f"best single degree ({static.best})", f"this plan ({made.candidate})",
        f"{static.seconds[static.best]:.4g}", f"{made.idle:.1%}", f"{sum(LENGTHS):,}", "What to change:", "256 tokens",
    ):  # fmt: skip
        assert said in out, said
    for batch in made.micro_batches:
        assert explain.degrees_of(batch) in out


@pytest.mark.parametrize("width", [24, 40, 100])
def test_the_picture_shows_every_group(tmp_path: Path, width: int, capsys: pytest.CaptureFixture[str]) -> None:
    made = made_for(tmp_path)
    columns = picture.columns_of(made, width)
    for batch, entry in enumerate(made.micro_batches):
        row = picture.cells(made, batch, columns[batch], 8)
        for group in entry.groups:
            shown = [rank for rank, (drawn, filled, _) in enumerate(row) if drawn == group and filled >= 1]
            assert shown == list(group.ranks)
        busy = {rank for group in entry.groups for rank in group.ranks}
        assert all(row[rank][0] is None for rank in set(range(8)) - busy)
        longest = max(entry.groups, key=lambda group: group.time)
        assert row[longest.ranks.start][1] == columns[batch]
    picture.draw(made, 8, Console(width=width, color_system=None))
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("ranks a group")]
    assert max(map(len, lines)) <= width
    for degree in {group.degree for batch in made.micro_batches for group in batch.groups}:
        assert any(picture.letter(degree, second) in line for line in lines for second in (False, True))


def test_neighbours_of_a_degree_differ(tmp_path: Path) -> None:
    made = made_for(tmp_path)
    for batch in range(len(made.micro_batches)):
        row = picture.cells(made, batch, 10, 8)
        for (one, _, shade), (other, _, next_shade) in zip(row, row[1:]):
            if one and other and one != other and one.degree == other.degree:
                assert shade != next_shade


def test_a_png_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "plan.png"
    assert cli.main([*step(tmp_path), "--png", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    assert [each.name for each in tmp_path.glob(".*")] == []


def test_a_run_s_documents_and_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], wide: None) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for index, length in enumerate((500, 30, 200)):
        (texts / f"{index}.txt").write_text("a" * length)
    config = tmp_path / "run.yaml"
    config.write_text(f"data:\n  paths: [{texts}]\n  cache_dir: {tmp_path / 'cache'}\n  validation_fraction: 0\n")
    command = ["plan", "--config", str(config), "--cluster", cluster_file(tmp_path), *TINY, "--json"]
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert sorted(found["lengths"]) == [31, 201, 501]  # an end-of-document token each
    assert cli.main([*command, "--documents", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["lengths"] == found["lengths"][:2]


def test_the_synthetic_mix_and_the_shipped_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--published", "7B", "--cluster", "a100_64", "--synthetic", "--documents", "24", "--json"]
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ranks"] == 64 and len(found["lengths"]) == 24 and found["plan"]["bound"] <= found["plan"]["time"]


def test_a_solver_is_asked_on_small_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("scipy")
    short = lengths_file(tmp_path, LENGTHS[:5])
    command = ["plan", "--published", "7B", "--cluster", cluster_file(tmp_path, ranks=4), "--lengths", short]
    assert cli.main([*command, "--exact", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    exact = found["exact"]
    assert exact["optimal"] and exact["seconds"] == pytest.approx(found["plan"]["time"], rel=1e-6)
    assert found["plan"]["bound"] <= exact["bound"] <= exact["seconds"] * (1 + 1e-9)


def test_words_name_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str], wide: None) -> None:
    def said(*flags: str, lengths: list[int] | None = None, **changes: object) -> str:
        command = ["plan", "--published", "7B", "--cluster", cluster_file(tmp_path, **changes)]
        assert cli.main([*command, "--lengths", lengths_file(tmp_path, lengths), *flags, "--json"]) == 0
        return "\n".join(json.loads(capsys.readouterr().out)["advice"])

    assert "nearly fills the memory of the largest group (2,048 tokens)" in said(lengths=[2040, 20, 30])
    assert "is the fixed cost of" in said()
    alone = {level: {"bandwidth": 1e6} for level in ("node", "network")}  # nobody would split a document
    waiting = said(lengths=[2000], memory_tokens=20000, links=alone)
    assert "Ranks wait" in waiting and "put more documents into a step" in waiting
    equal = said(lengths=[6000] * 8, memory_tokens=6100)
    assert "A single degree of " in equal and "is about as good" in equal and "Ranks wait" not in equal
    slow = {"node": {"bandwidth": 1e8, "latency": 1e-2}, "network": {"bandwidth": 1e8, "latency": 1e-2}}
    run = ["--model.pattern", "L", "--linear-engine", "ring"]
    assert "Linear layers: " in said(*run, lengths=[60000, 50000], memory_tokens=8000, links=slow)
