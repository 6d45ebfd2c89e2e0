"""`longhaul bench engines`: a tiny run of each of its forms, and its arithmetic. Nothing is said about times."""

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longhaul.launcher.bench import engines, kv_ring, namespaces, regret
from longhaul.launcher.bench.cli import main
from longhaul.launcher.bench.engine_ranks import Layer, Phases, linear_slept, measure_phases
from longhaul.launcher.bench.ranks import run_on_ranks
from longhaul.models.errors import UserError
from longhaul.models.ops.scalar_decay.naive import scalar_decay
from longhaul.models.ops.segments import Documents, Segments
from longhaul.parallel.comm import Comm
from longhaul.parallel.exchange.cost import FLAT
from longhaul.parallel.runtime import Runtime
from tests.harness import run_ranks
from tests.harness.numerics import assert_close

SMALL = ["--heads", "2", "--width", "4", "--repeats", "1"]
STATE = 2 * 4 * 4 * 4  # bytes


def test_a_table_of_computed_engines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.json"
    arguments = ["--lengths", "6", "9", "--exchanges", "all_gather", "ring", "all_scan", "--attention", "ring"]
    arguments += ["--scan-blocks", "4"]
    assert main(["engines", *arguments, *SMALL, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["layer"], row["engine"]) for row in rows[:4]] == [
        *(("linear", name) for name in ("all_gather", "ring", "all_scan")),
        ("softmax", "ring"),
    ]
    assert [row["tokens"] for row in rows] == [6] * 4 + [9] * 4
    # Each way, a gather brings every rank the other's state; a ring brings it to one of two.
    assert [row["bytes"] for row in rows[:3]] == [2 * STATE, STATE, STATE]
    assert [row["messages"] for row in rows[:3]] == [2, 1, 4]
    # Keys and values of 3 tokens forward, and backward again with their gradients home.
    assert rows[3]["bytes"] > 2 * 3 * STATE / 4
    assert all(row["total_s"] > 0 and row["overhead_s"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert "one kernel for all, computed" in printed and "softmax ring attention" in printed


def ring_of_keys_and_values(
    rank: int, world_size: int, log_decay: Tensor, bounds: list[int], x: list[Tensor]
) -> tuple[Tensor, ...]:
    """One rank's outputs and gradients, of q, k, v and dout of the whole sequence."""
    own = slice(bounds[rank], bounds[rank + 1])
    comm = Comm(dist.group.WORLD)
    return kv_ring.forward_backward(comm, kv_ring.Computed(log_decay), bounds, *(tensor[own] for tensor in x))


@pytest.mark.parametrize(("ranks", "bounds"), [(2, [0, 5, 12]), (3, [0, 4, 9, 11]), (4, [0, 3, 7, 8, 13])])
def test_ring_attention_on_a_linear_layer_is_the_linear_layer(ranks: int, bounds: list[int]) -> None:
    """With uneven blocks: outputs and every gradient are those of the recurrence, token by token."""
    log_decay = -torch.tensor([1e-3, 0.2], dtype=torch.float64)
    x = [torch.randn(bounds[-1], 2, width, dtype=torch.float64) for width in (3, 3, 4, 4)]
    leaves = [tensor.clone().requires_grad_() for tensor in x[:3]]
    expected, _ = scalar_decay(*leaves, log_decay, Segments(Documents((0, bounds[-1])), [(0, bounds[-1])]))
    wanted = (expected, *torch.autograd.grad(expected, leaves, x[3]))
    found = run_ranks(ring_of_keys_and_values, ranks, log_decay=log_decay, bounds=bounds, x=x)
    for name, index in (("out", 0), ("dq", 1), ("dk", 2), ("dv", 3)):
        assert_close(torch.cat([each[index] for each in found]), wanted[index], name, tolerance=1e-12)


def test_scores_are_cut_into_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = kv_ring.Computed(-torch.tensor([1e-3, 0.2]))
    q, k, v, dout = (torch.randn(7, 2, 4) for _ in range(4))
    whole = kernels.other(q, k, v, 9), *kernels.other_backward(q, k, v, 9, dout)
    monkeypatch.setattr(kv_ring, "ROWS", 3)
    for one, other in zip(whole, (kernels.other(q, k, v, 9), *kernels.other_backward(q, k, v, 9, dout))):
        assert_close(other, one, "rows", tolerance=1e-6)


def test_a_table_with_the_ring_of_keys_and_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.json"
    arguments = ["--lengths", "8", "--exchanges", "all_gather", "kv_ring", "--attention", "--json", str(path)]
    for compute in ("real", "sleep"):
        assert main(["engines", *arguments, *SMALL, "--compute", compute]) == 0
        state, ring = json.loads(path.read_text())["rows"]
        block = 4 * 2 * 8 * 4  # tokens, heads, keys and values, bytes
        # The second rank receives the first one's block twice, the first the gradients of its own.
        assert (state["bytes"], ring["bytes"]) == (2 * STATE, 2 * block)
        assert "over ring attention on the linear layer (kv_ring): P = 2, 8 tokens" in capsys.readouterr().out


def test_a_table_of_slept_engines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.json"
    arguments = ["--lengths", "9", "--exchanges", "ring_blocking", "auto", "--compute", "sleep", "--delay", "1"]
    assert main(["engines", "--ranks", "3", *arguments, *SMALL, "--json", str(path)]) == 0
    assert [row["engine"] for row in json.loads(path.read_text())["rows"]] == ["ring_blocking", "auto"]
    printed = capsys.readouterr().out
    assert "emulated wire, 1 ms" in printed and "slept" in printed


def test_regret(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "found.json"
    arguments = ["--regret", "--lengths", "4", "--delays", "1", "--bandwidths", "100", "--maps", "scalar", "dense"]
    assert main(["engines", *arguments, *SMALL, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["maps"] for row in rows] == ["scalar", "dense"]
    for row in rows:
        assert set(row["times_s"]) == {*FLAT, "auto"}
        assert set(row["picked"]) <= set(FLAT) and row["best"] in FLAT
        assert row["regret"] == max(0.0, row["times_s"]["auto"] / row["times_s"][row["best"]] - 1)
    assert "auto over the best exchange, 2 cells" in capsys.readouterr().out
    # What is in the file is not measured again.
    monkeypatch.setattr(regret, "measure_phases", None)
    assert main(["engines", *arguments, *SMALL, "--json", str(path)]) == 0
    assert json.loads(path.read_text())["rows"] == rows


def test_the_slowest_rank_sets_a_time_and_the_median_repeat_counts() -> None:
    fast = {"pairs": [(5.0, 4.0, 1.0), (50.0, 4.0, 1.0), (6.0, 4.0, 1.0)], "messages": 1, "bytes": 10}
    slow = {"pairs": [(7.0, 3.0, 2.0), (8.0, 3.0, 2.0), (9.0, 3.0, 0.0)], "messages": 2, "bytes": 5}
    assert engines.combine([fast, slow]) == {
        "total_s": 9.0,
        "overhead_s": 2.0,
        "compute_s": 2.0,
        "exposed_s": 5.0,
        "messages": 2,
        "bytes": 10,
    }


def _row(layer: str, engine: str, seconds: float) -> dict[str, Any]:
    return {"layer": layer, "engine": engine, "ranks": 2, "tokens": 64, "total_s": seconds}


def test_claims_are_ratios_of_speeds() -> None:
    rows = [_row("linear", "all_gather", 2.0), _row("linear", "ring_blocking", 2.5), _row("softmax", "ring", 3.0)]
    lasp, ring = engines.claims(rows)
    assert "as published" in lasp and lasp.endswith("P = 2, 64 tokens: +25.0%")
    assert "softmax ring attention" in ring and ring.endswith("P = 2, 64 tokens: +50.0%")


def test_summary_of_regrets() -> None:
    times = {"all_gather": 1.0, "ring": 2.0, "all_scan": 1.5, "log_scan": 1.0}
    rows = [
        {"times_s": times, "best": "all_gather", "regret": 0.1, "regret_of_pick": 0.5},
        {"times_s": times, "best": "all_gather", "regret": 0.3, "regret_of_pick": None},
    ]
    lines = regret.summary(rows).splitlines()
    assert lines[0] == "auto over the best exchange, 2 cells: median 20.0%, worst 30.0%"
    assert lines[1] == "by the time of what it picked, 1 cells: median 50.0%, worst 50.0%"
    assert "ring everywhere: median 100.0%, worst 100.0%" in lines


def test_sleeps_stand_around_the_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[object] = []

    class Noted:
        def start(self, maps: Any, chain: Any, initial: Any, reverse: bool) -> "Noted":
            events.append("reverse" if reverse else "start")
            return self

        def wait(self) -> None:
            events.append("wait")

    monkeypatch.setattr("time.sleep", events.append)
    linear_slept(Layer(1, 2), Comm(None), Noted(), 4, Phases(1, 2, 3, 4, 5, 6))()  # type: ignore[arg-type]
    assert events == [1, "start", 2, "wait", 3, 4, "reverse", 5, "wait", 6]


@pytest.mark.parametrize("dense", [False, True])
def test_phases_are_measured(dense: bool) -> None:
    assert min(measure_phases(Layer(1, 4, dense), 3, repeats=1)) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "1"], r"--ranks is \[1\]: give at least 2"),
        (["--ranks", "4", "--lengths", "3"], r"--lengths is \[3\]: give at least 4"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--scan-blocks", "0"], "--scan-blocks is 0"),
        (["--delay", "-1"], "--delay is below 0"),
        (["--namespaces", "--delay", "1"], "has its own wire"),
        (["--rate", "1mbit"], "--rate 1mbit is of --namespaces"),
    ],
)
def test_mistakes_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(["engines", *arguments])


def test_two_level_engines_are_not_offered() -> None:
    options: argparse.Namespace = engines._arguments([])
    assert "hierarchical" not in options.exchanges and "auto" in options.exchanges


def _namespaces_work() -> bool:
    try:
        namespaces.check()
        with namespaces.joined(1, "100mbit"):
            return True
    except UserError:
        return False


def test_ranks_in_namespaces(capsys: pytest.CaptureFixture[str]) -> None:
    if not _namespaces_work():
        pytest.skip("needs root and network namespaces")
    arguments = ["--lengths", "6", "--exchanges", "ring", "--attention", "--namespaces", "--rate", "100mbit"]
    assert main(["engines", *arguments, *SMALL]) == 0
    assert "network namespaces, 100mbit" in capsys.readouterr().out
    left = subprocess.run(("ip", "netns", "list"), capture_output=True, text=True, check=True).stdout
    assert f"lh{os.getpid()}" not in left


def test_a_machine_without_namespaces_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match="needs root and the commands ip and tc"):
        main(["engines", "--namespaces"])


def many_numbers(runtime: Runtime) -> dict[str, Any]:
    return {"numbers": list(range(100_000))}


def test_answers_larger_than_a_pipe_come_back() -> None:
    assert [answer["numbers"][-1] for answer in run_on_ranks(many_numbers, 1, 1)] == [99_999]
