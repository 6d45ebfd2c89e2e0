"""Metrics: what is written when, what a step's time holds, how a run is continued."""

import functools
import io
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from longhaul.launcher.metrics import Metrics, MetricsConfig, hardware, traffic_of
from longhaul.launcher.metrics.display import RichDisplay
from longhaul.launcher.metrics.files import encode_record, read_facts, read_records
from longhaul.models.errors import UserError
from longhaul.parallel.comm import Ledger

LOSS, HELD_OUT = "loss_metrics/global_avg_loss", "validation_metrics/global_avg_loss"


def _metrics(folder: Path, total_steps: int = 10, log_every: int = 1, **options: Any) -> Metrics:
    return Metrics(MetricsConfig(log_every=log_every, display="none"), folder, total_steps=total_steps, **options)


class _Clock:
    """A clock that moves when told to, in place of the real one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_records_hold_the_documented_names(tmp_path: Path) -> None:
    with _metrics(tmp_path, flops_per_token=1e3) as metrics:
        metrics.start_step()
        metrics.log(1, tokens=64, loss=torch.tensor(2.5), grad_norm=1.0, learning_rate=1e-3, traffic={"state": (1, 2048)})
    (record,) = read_records(tmp_path)
    assert {
        "step", "time", LOSS, "grad_norm", "learning_rate", "throughput(tps)", "tflops", "time_metrics/end_to_end(s)",
        "time_metrics/data_loading(s)", "memory/max_active(GiB)", "communication/received(MiB)",
        "communication/messages", "communication/received_bytes/state", "communication/messages/state", "n_tokens_seen",
    } == set(record)  # fmt: skip
    assert (record["step"], record[LOSS], record["communication/received_bytes/state"]) == (1, 2.5, 2048)
    assert record["communication/received(MiB)"] * 2**20 == 2048
    assert record["memory/max_active(GiB)"] > 0.01  # a process that has imported torch


def test_throughput_is_per_process_and_of_steps_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch)
    config = MetricsConfig(log_every=2, display="none", peak_flops=1e6)
    metrics = Metrics(config, tmp_path, world_size=4, total_steps=4, flops_per_token=500.0)
    for step in (1, 2, 3, 4):
        clock.sleep(50)  # between steps
        metrics.start_step()
        with metrics.loading():
            clock.sleep(0.5)
        clock.sleep(1.5)
        with metrics.outside("evaluation"):
            clock.sleep(30)
        metrics.log(step, tokens=800, loss=1.0)
        with metrics.outside("checkpoint"):
            clock.sleep(7)
    metrics.close()
    records = read_records(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 4]
    for record in records:
        assert record["throughput(tps)"] == pytest.approx(800 / 2 / 4)
        assert record["mfu(%)"] == pytest.approx(100 * 100 * 500 / 1e6)
        assert record["tflops"] == pytest.approx(100 * 500 / 1e12)
        assert record["time_metrics/end_to_end(s)"] == pytest.approx(2)
        assert record["time_metrics/data_loading(s)"] == pytest.approx(0.5)
    assert records[-1]["n_tokens_seen"] == 3200
    assert read_facts(tmp_path)["outside_seconds"] == pytest.approx({"evaluation": 120, "checkpoint": 28})


def test_no_mfu_without_a_known_peak(tmp_path: Path) -> None:
    with _metrics(tmp_path, flops_per_token=1e3) as metrics:
        metrics.log(1, tokens=8, loss=1.0)
    assert "tflops" in read_records(tmp_path)[0] and "mfu(%)" not in read_records(tmp_path)[0]
    assert hardware.peak_flops("NVIDIA H100 80GB HBM3") == hardware.peak_flops("NVIDIA H200") == 989e12
    assert hardware.peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert hardware.peak_flops("NVIDIA GeForce RTX 4090") is None


def test_a_step_that_is_not_recorded_reads_no_tensor(tmp_path: Path) -> None:
    class Unread:
        def __float__(self) -> float:
            raise AssertionError("the device was made to wait")

    with _metrics(tmp_path, log_every=5) as metrics:
        metrics.log(1, tokens=1, loss=1.0)
        assert [step for step in range(1, 11) if metrics.due(step)] == [1, 5, 10]
        metrics.log(2, tokens=1, loss=Unread(), grad_norm=Unread(), extra={"aux": Unread()})  # type: ignore[arg-type, dict-item]
    assert [record["step"] for record in read_records(tmp_path)] == [1]


def test_other_ranks_write_and_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    config = MetricsConfig(display="plain")
    with Metrics(config, folder, is_main=False, world_size=2, total_steps=1) as metrics:
        metrics.record(title="no")
        metrics.start_step()
        with metrics.loading(), metrics.outside("evaluation"):
            pass
        metrics.log(1, tokens=1, loss=1.0)
        metrics.log_evaluation(1, 1.0)
        metrics.message("no")
        assert metrics.due(1)
    assert not folder.exists()
    assert capfd.readouterr() == ("", "")


def test_the_plain_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Metrics(MetricsConfig(display="plain"), tmp_path, total_steps=100) as metrics:
        metrics.log(1, tokens=10, loss=2.5, grad_norm=0.75, learning_rate=1e-3, traffic={"state": (1, 2**20)})
        metrics.log_evaluation(1, 3.25, 1000)
    header, line, held_out = capsys.readouterr().out.splitlines()
    assert "per process" in header
    assert line.startswith("step   1/100  loss 2.5000  grad_norm 0.750  lr 1.00e-03  ")
    assert "tokens/s/process" in line and line.endswith("received 1.00MiB")
    assert held_out == "step 1: held-out loss 3.2500 nats per token over 1,000 tokens"


def test_the_bar_shows_the_last_record_and_messages_stay_above_it() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    display = RichDisplay(10, 4, console)
    display.advance(5)
    display.record(6, {LOSS: 2.5, "throughput(tps)": 1234.0})
    display.message("held-out [red]loss[/red] 3.0")
    display.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())  # type: ignore[attr-defined]
    assert "held-out [red]loss[/red] 3.0" in text
    assert re.search(r"6/10 .*loss 2\.5000  1,234 tokens/s/process", text)


def test_a_resumed_run_drops_what_it_repeats_and_torn_lines(tmp_path: Path) -> None:
    with _metrics(tmp_path) as metrics:
        metrics.record(title="kept")
        for step in range(1, 8):
            metrics.log(step, tokens=10, loss=float(step))
            metrics.log_evaluation(step, float(step))
        started = read_facts(tmp_path)["started"]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss_met')
    with _metrics(tmp_path, resumed_step=5) as metrics:
        metrics.log(6, tokens=10, loss=60.0)
    records = read_records(tmp_path)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(records)
    assert [record["step"] for record in records if LOSS in record] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records if HELD_OUT in record] == [1, 2, 3, 4, 5]
    assert records[-1][LOSS] == 60 and records[-1]["n_tokens_seen"] == 60
    facts = read_facts(tmp_path)
    assert (facts["title"], facts["started"], facts["sessions"]) == ("kept", started, 2)


def test_a_new_start_sets_earlier_metrics_aside(tmp_path: Path) -> None:
    for loss in (1.0, 2.0, 3.0):
        with _metrics(tmp_path) as metrics:
            metrics.log(1, tokens=1, loss=loss)
    assert read_records(tmp_path)[0][LOSS] == 3
    assert [json.loads((tmp_path / f"metrics-{n}.jsonl").read_text())[LOSS] for n in (1, 2)] == [1, 2]


def test_each_line_is_on_disk_at_once(tmp_path: Path) -> None:
    metrics = _metrics(tmp_path)
    metrics.log(1, tokens=1, loss=1.0)
    assert len(read_records(tmp_path)) == 1
    assert read_facts(tmp_path)["status"] == "running"
    metrics.close("stopped by SIGTERM")
    metrics.close()
    assert read_facts(tmp_path)["status"] == "stopped by SIGTERM"


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("no memory"), "failed: RuntimeError: no memory"), (KeyboardInterrupt(), "interrupted")],
)
def test_the_status_tells_how_a_run_ended(tmp_path: Path, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), _metrics(tmp_path):
        raise error
    assert read_facts(tmp_path)["status"] == status


def test_numbers_that_are_not_finite_stay_json() -> None:
    line = encode_record({"step": 1, LOSS: float("nan"), "grad_norm": float("inf")})
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert float(record["grad_norm"]) == float("inf") and float(record[LOSS]) != float(record[LOSS])


def test_tensorboard_has_the_same_names(tmp_path: Path) -> None:
    config = MetricsConfig(tensorboard=True, display="none")
    with Metrics(config, tmp_path, total_steps=2) as metrics:
        metrics.log(1, tokens=1, loss=4.0)
        metrics.log(2, tokens=1, loss=2.0)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars(LOSS)] == [(1, 4.0), (2, 2.0)]
    assert "throughput(tps)" in events.Tags()["scalars"]


def test_traffic_sums_a_ledgers_collectives_by_label() -> None:
    ledger = Ledger()
    ledger.add("state", "all_gather", 3, 100)
    ledger.add("state", "reduce_scatter", 3, 50)
    ledger.add("kv", "all_gather", 1, 7)
    assert traffic_of(ledger.counts) == {"state": (6, 150), "kv": (1, 7)}


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot write metrics to the run folder .*file.*Not a directory"):
        _metrics(tmp_path / "file" / "run")


def test_formulas_are_asked_for_on_recorded_steps_alone(tmp_path: Path) -> None:
    asked: list[int] = []

    def formula(step: int) -> dict[str, int]:
        asked.append(step)
        return {"kv": 8 * step}

    with _metrics(tmp_path, log_every=5) as metrics:
        for step in range(1, 6):
            metrics.log(step, tokens=1, traffic={"kv": (1, 8)}, formula=functools.partial(formula, step))
    assert asked == [1, 5]
    assert [record["communication/formula_bytes/kv"] for record in read_records(tmp_path)] == [8, 40]


def test_the_effective_horizon_is_a_record_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Metrics(MetricsConfig(display="plain"), tmp_path, total_steps=4) as metrics:
        metrics.log_horizon(3, 1234.0, float("inf"))
    (record,) = read_records(tmp_path)
    assert (record["step"], record["effective_horizon/min(tokens)"]) == (3, 1234.0)
    assert float(record["effective_horizon/median(tokens)"]) == float("inf")
    assert "step 3: effective horizon 1,234 tokens in the layer that looks back least, inf in" in capsys.readouterr().out


@pytest.mark.parametrize("option", [{"log_every": 0}, {"horizon_every": -1}, {"display": "loud"}, {"peak_flops": 0.0}])
def test_impossible_options_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(option))):
        MetricsConfig(**option)
