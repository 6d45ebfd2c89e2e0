"""What a person gets wrong: one sentence, exit code 2, and the next best thing by name."""

import importlib.util
from pathlib import Path

import pytest

from longhaul.launcher import cli
from longhaul.launcher.plan.costs import published_model
from longhaul.launcher.plan.inputs import make_cluster, read_cluster, read_lengths, shipped_clusters
from longhaul.models.errors import UserError
from longhaul.parallel.planner import Link
from tests.launcher_plan.files import cluster_file, cluster_values, lengths_file

MODEL = published_model("7B", 1.0, None, "sum")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["plan", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"memory_tokens": None}, "states no memory: give one of memory (bytes"),
        ({"memory": 1e9}, "states memory and memory_tokens: give one of"),
        ({"memory_tokens": None, "memory": 1000}, "leaves no room for a token"),
        ({"ranks": None}, "states no ranks"),
        ({"links": None}, "states no links"),
        ({"rank_per_node": 4}, "The key rank_per_node in the cluster file"),
        ({"rank_per_node": 4}, "did you mean ranks_per_node?"),
        ({"links": {"nod": {"bandwidth": 1}}}, "did you mean node?"),
        ({"links": {"node": {"bandwidth": 1}}}, "links states no network"),
        ({"links": {"node": {"bandwith": 1}, "network": {"bandwidth": 1}}}, "did you mean bandwidth?"),
        ({"links": {"node": {"latency": 1}, "network": {"bandwidth": 1}}}, "links.node states no bandwidth"),
        ({"links": [{"span": 4, "bandwidth": 1}]}, "add a link whose span is the number of ranks"),
        ({"links": [{"bandwidth": 1}]}, "has no span"),
        ({"ranks": "many"}, "ranks is 'many': give a number"),
        ({"ranks": 2.5}, "give a whole number"),
        ({"ranks": 6}, "not a multiple of ranks_per_node 4"),
        ({"speeds": [1, 1, 1]}, "`speeds` has 3 values for 8 ranks"),
        ({"speeds": "fast"}, "give a list of numbers"),
        ({"all_to_all": [1]}, "give keys and values"),
    ],
)
def test_a_bad_cluster_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], said: str) -> None:
    command = ["--published", "7B", "--cluster", cluster_file(tmp_path, **changes), "--lengths", lengths_file(tmp_path)]
    assert said in refused(capsys, *command)


def test_a_document_that_fits_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = lengths_file(tmp_path, [10, 2049])
    err = refused(capsys, "--published", "7B", "--cluster", cluster_file(tmp_path), "--lengths", lengths)
    assert "A document of 2049 tokens does not fit the 2048 tokens" in err and "train.stream_tokens" in err


def test_no_solver(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in ("highspy", "scipy") else find(name, *rest)
    )
    command = ["--published", "7B", "--cluster", cluster_file(tmp_path), "--lengths", lengths_file(tmp_path)]
    err = refused(capsys, *command, "--exact")
    assert "not installed: pip install 'longhaul[planner]'" in err and "`shelf`" in err


def test_missing_things(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster, lengths, away = cluster_file(tmp_path), lengths_file(tmp_path), str(tmp_path / "none.yaml")
    model = ["--published", "7B"]
    assert "or --cluster a100_64" in refused(capsys, *model, "--lengths", lengths)
    assert "--config FILE.yaml of a run, or --published 7B" in refused(capsys, "--cluster", cluster)
    assert "shipped cluster a100_64" in refused(capsys, *model, "--cluster", away, "--lengths", lengths)
    assert "No documents are named" in refused(capsys, *model, "--cluster", cluster)
    assert "--lengths" in refused(capsys, *model, "--cluster", cluster, "--lengths", away)
    assert "No such file" in refused(capsys, "--config", away, "--cluster", cluster, "--lengths", lengths)
    config = tmp_path / "run.yaml"
    config.write_text("train: {steps: 1}\n")
    run = ["--config", str(config), "--cluster", cluster, "--lengths", lengths]
    assert "that longhaul plan calibrate wrote" in refused(capsys, *run, "--calibration", away)
    assert "exclude each other" in refused(capsys, *run, *model, "--calibration", away)
    assert "did you mean --train.steps?" in refused(capsys, *run, "--train.stebs", "3")
    assert "in a folder that exists" in refused(capsys, *model, *run[2:], "--json", "--png", str(tmp_path / "no" / "a.png"))


@pytest.mark.parametrize(
    ("text", "said"), [("12\nx\n", "Line 2"), ("0\n", "Line 1"), ("-3\n", "Line 1"), ("\n", "holds no number")]
)
def test_bad_lengths(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        read_lengths(path)


def test_what_a_cluster_file_means(tmp_path: Path) -> None:
    cluster = make_cluster(cluster_values(speeds=[1, "0.5"], all_to_all={8: "5e9"}), MODEL)
    assert cluster.links == (Link(4, 1e12, 1e-6), Link(8, 1e11, 2e-6))
    assert cluster.speeds == (1.0,) * 4 + (0.5,) * 4 and cluster.all_to_all == {8: 5e9}
    assert MODEL.tokens_per_rank(cluster) == 256
    mebibytes = make_cluster(cluster_values(memory_tokens=None, memory_mb=30000), MODEL)
    assert mebibytes.memory == 30000 * 2**20
    one_level = [{"span": 8, "bandwidth": 3e9}, {"span": 2, "bandwidth": 4e9}]
    assert make_cluster(cluster_values(links=one_level), MODEL).links == (Link(2, 4e9), Link(8, 3e9))
    single = make_cluster(cluster_values(ranks_per_node=1, links={"network": {"bandwidth": 1e9}}), MODEL)
    assert single.links == (Link(8, 1e9),)


@pytest.mark.parametrize("name", shipped_clusters())
def test_shipped_clusters_are_read(name: str) -> None:
    cluster = make_cluster(read_cluster(name), MODEL)
    assert cluster.ranks > 1 and MODEL.tokens_per_rank(cluster) > 1000
