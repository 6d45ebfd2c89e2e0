"""The report: made from a run's files alone, whatever state they are in."""

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from longhaul.launcher.metrics import Metrics, MetricsConfig
from longhaul.launcher.report import main, write_report
from longhaul.models.errors import UserError

_VOID = {"meta", "br", "link", "img"}


class _Page(HTMLParser):
    """Collects text, and checks that every tag is closed and nothing is loaded from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert not self.open, f"unclosed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert name != "src" and not (name.endswith("href") and not (value or "").startswith("#")), (tag, value)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def _run(folder: Path, steps: int = 30, close: str = "finished") -> None:
    metrics = Metrics(MetricsConfig(display="none"), folder, total_steps=30, world_size=2)
    metrics.record(
        title="<tiny> run",
        parameters=1_234_567,
        model={"pattern": "LLLN"},
        parallel={"data": 1, "sequence": 2},
        baselines={"byte unigram": 3.21, "uniform": 5.55},
        engines=["auto on 2 ranks: a message takes 12 us", "  LogScale (2,): ring"],
        command="torchrun --nproc-per-node=2 launcher/train.py --train.steps 30",
        resume_command="longhaul train --resume",
    )
    for step in range(1, steps + 1):
        metrics.start_step()
        traffic = {"scan state": (1, 4096 + (step == 7)), "halo": (1, 64), "kv": (2, 8192)}
        metrics.log(
            step, tokens=100, loss=5.0 / step, traffic=traffic, formula=lambda: {"scan state": 4096, "halo": 64, "sum": 5}
        )
        if step % 15 == 0:
            metrics.log_horizon(step, 100.0 * step, 200.0 * step)
        if step % 10 == 0:
            metrics.log_evaluation(step, 6.0 / step)
    metrics.close(close)
    (folder / "sample.txt").write_text("prompt: if\n\nif a < b & c:\n")


def _open(folder: Path) -> tuple[str, dict[str, Any]]:
    page = write_report(folder).read_text()
    return " ".join(_Page(page).texts), json.loads((folder / "report.json").read_text())


def test_the_page_shows_what_was_measured(tmp_path: Path) -> None:
    _run(tmp_path)
    text, data = _open(tmp_path)
    for expected in (
        "<tiny> run", "finished, 30 of 30 steps", "0.200", "byte unigram 3.21, uniform 5.55", "1.23 M", "LLLN",
        "data 1, sequence 2", "12.1 KiB", "29 of 30", "30 of 30", "0 of 30", "a message takes 12 us",
        "launcher/train.py --train.steps 30", "least 3,000", "if a < b & c:", "longhaul train --resume",
    ):  # fmt: skip
        assert expected in text, expected
    assert data["final"] == {"loss_metrics/global_avg_loss": 5 / 30, "validation_metrics/global_avg_loss": 0.2}
    assert data["curves"]["validation_metrics/global_avg_loss"] == [[10, 0.6], [20, 0.3], [30, 0.2]]
    assert data["tokens_seen"] == 3000 and data["facts"]["versions"]["torch"]
    keys = ("label", "messages", "bytes", "formula", "records", "equal")
    assert [tuple(row[key] for key in keys) for row in data["traffic"]] == [
        ("scan state", 1, 4096, 4096, 30, 29),
        ("halo", 1, 64, 64, 30, 30),
        ("kv", 2, 8192, None, 0, 0),
        ("sum", None, None, 5, 30, 0),
    ]
    assert data["horizon"] == {"shortest": 3000, "median": 6000}


def test_the_curves_are_in_the_page(tmp_path: Path) -> None:
    _run(tmp_path)
    page = write_report(tmp_path).read_text()
    svg = page[page.index("<svg") : page.index("</svg>")]
    # Text is drawn as glyphs; each string is left in a comment beside them.
    for label in ("training", "held-out documents", "byte unigram 3.21", "uniform 5.55", "step", "median layer"):
        assert f"<!-- {html.escape(label)} -->" in svg, label
    assert len(re.findall("#d9480f", svg)) >= 3  # the held-out points


def test_a_run_that_was_killed_gives_a_report(tmp_path: Path) -> None:
    _run(tmp_path, steps=7, close="running")  # what a killed process leaves
    for missing in ("sample.txt", "run.json"):
        (tmp_path / missing).unlink()
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 8, "loss_me')
        text, data = _open(tmp_path)
        assert "not finished" in text and data["last_step"] == 7
    assert "Generated sample" not in text
    (tmp_path / "run.json").write_text("{torn")
    assert _open(tmp_path)[1]["title"] == tmp_path.name


def test_a_failed_run_says_so(tmp_path: Path) -> None:
    _run(tmp_path, steps=1, close="failed: RuntimeError: a <b>")
    text, _ = _open(tmp_path)
    assert "failed: RuntimeError: a <b>" in text and "1 of 30 steps" in text


def test_a_diverged_run_gives_a_report(tmp_path: Path) -> None:
    with Metrics(MetricsConfig(display="none"), tmp_path, total_steps=4) as metrics:
        for step, loss in enumerate([2.0, 1e30, float("inf"), float("nan")], 1):
            metrics.log(step, tokens=1, loss=loss)
    _, data = _open(tmp_path)
    assert data["curves"]["loss_metrics/global_avg_loss"] == [[1, 2.0], [2, 1e30], [3, None], [4, None]]


def test_evaluation_alone_gives_a_report(tmp_path: Path) -> None:
    with Metrics(MetricsConfig(display="none"), tmp_path, total_steps=4) as metrics:
        metrics.log_evaluation(0, 5.5)
    assert "5.500" in _open(tmp_path)[0]


def test_time_is_counted_for_steps_between_records(tmp_path: Path) -> None:
    lines = [
        {"step": step, "throughput(tps)": 1.0, "time_metrics/end_to_end(s)": 2.0, "time_metrics/data_loading(s)": 0.5}
        for step in (1, 10, 20)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert _open(tmp_path)[1]["seconds"] == {"training": 40.0, "of it waiting for data": 10.0}


def test_the_command_rebuilds_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run(tmp_path)
    first = write_report(tmp_path).read_bytes()
    (tmp_path / "report.html").unlink()
    assert main([str(tmp_path)]) == 0
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    assert (tmp_path / "report.html").read_bytes() == first


def test_a_folder_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())
