"""The command as a person meets it: exit codes, one sentence on stderr, signals that save."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from longhaul.launcher.parsing import to_yaml
from longhaul.launcher.signals import SAVED, StopRequest
from longhaul.parallel.checkpoint import find

from .runs import tiny, write_corpus

SCRIPT = Path(__file__).parents[2] / "launcher" / "train.py"
LONG = 4000  # steps; ends by itself if no signal comes
Process = subprocess.Popen[str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus")
    return tmp_path


@pytest.fixture
def started() -> Iterator[list[Process]]:
    processes: list[Process] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def start(started: list[Process], *arguments: str, rank: int = 0, world_size: int = 1, port: int = 0) -> Process:
    """One process of a job; several find each other as under torchrun."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment["OMP_NUM_THREADS"] = "1"
    if world_size > 1:
        environment.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    started.append(process)
    return process


def config_file(folder: Path, steps: int = 4, **sections: dict[str, object]) -> str:
    config = tiny(folder, metrics={"display": "plain"}, train={"steps": steps, "device": "cpu"}, **sections)
    path = folder / "run.yaml"
    path.write_text(to_yaml(config))
    return str(path)


def wait_for_steps(process: Process) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if re.match(r"step +3/", line):
            return
    raise AssertionError(f"ended early: {process.stderr.read() if process.stderr else ''}")


def test_trains_and_tells_where_results_lie(folder: Path, started: list[Process]) -> None:
    process = start(started, "--config", config_file(folder), "--train.steps", "3")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert re.search(r"done: 3 steps, held-out loss \d\.\d+ nats", out)
    for name in ("report.html", "step_3", "metrics.jsonl", "sample.txt", "resolved_config.yaml"):
        assert str(folder / "run" / name) in out
        assert (folder / "run" / name).exists()


@pytest.mark.parametrize("arguments", [["--train.stepz", "3"], ["--data.paths", "[nowhere]"], ["--model.num_heads", "3"]])
def test_mistakes_are_one_sentence(folder: Path, started: list[Process], arguments: list[str]) -> None:
    process = start(started, "--config", config_file(folder), *arguments)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert out == ""
    assert re.fullmatch(r"error: .*\n", errors)
    assert not list((folder / "run").glob("step_*"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def test_only_the_main_process_speaks(folder: Path, started: list[Process]) -> None:
    port = free_port()
    arguments = ("--config", config_file(folder), "--data.paths", "[nowhere]")
    processes = [start(started, *arguments, rank=rank, world_size=2, port=port) for rank in (0, 1)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert re.fullmatch(r"error: .*nowhere.*\n", errors[0])
    assert errors[1] == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_the_command_goes_on(folder: Path, started: list[Process], number: signal.Signals) -> None:
    path = config_file(folder, steps=LONG)
    process = start(started, "--config", path)
    wait_for_steps(process)
    process.send_signal(number)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == SAVED, errors
    assert "the same command goes on from there" in out
    found, _ = find(folder / "run")
    assert found is not None
    assert found.step >= 3
    if number != signal.SIGTERM:
        return
    again = start(started, "--config", path, "--train.steps", str(found.step + 1))
    out, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert f"going on from {found.path}" in out


def test_a_signal_to_one_process_stops_all(folder: Path, started: list[Process]) -> None:
    port = free_port()
    path = config_file(folder, steps=LONG, parallel={"sequence_parallel_size": 2})
    processes = [start(started, "--config", path, rank=rank, world_size=2, port=port) for rank in (0, 1)]
    wait_for_steps(processes[0])
    processes[1].send_signal(signal.SIGUSR1)
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == SAVED, errors
    assert find(folder / "run")[0] is not None


def test_an_early_signal_is_not_lost(folder: Path, started: list[Process]) -> None:
    process = start(started, "--config", config_file(folder, steps=LONG))
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        pytest.skip("needs /proc to see when the handler is there")
    deadline = time.monotonic() + 60
    mask = 1 << (signal.SIGTERM - 1)
    while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) & mask:  # type: ignore[index]
        assert time.monotonic() < deadline, "no handler"
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == SAVED, errors
    assert find(folder / "run")[0].step == 0  # type: ignore[union-attr]


def test_a_second_ctrl_c_ends_at_once(folder: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert signal.getsignal(signal.SIGINT) == stop._handle
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == before


def test_torchrun_is_told_the_reason(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from longhaul.launcher.train import main

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
    assert main(["--train.stepz", "1"]) == 2
    assert "--train.stepz is unknown" in (folder / "error.json").read_text()
    assert "--train.stepz is unknown" in capsys.readouterr().err
