"""`longhaul bench rsa`: its search, what its peaks count, its opponent of 2019, and its arithmetic."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longhaul.launcher.bench import rsa
from longhaul.launcher.bench.cli import main
from longhaul.launcher.bench.rsa_ranks import SIDES, Axis, Job, Shape, make_job, step_peak
from longhaul.launcher.bench.rsa_search import largest
from longhaul.launcher.bench.rsa_wire import Apart
from longhaul.models.encoder import Encoder
from longhaul.models.errors import UserError
from longhaul.models.ops.segments import Documents
from longhaul.parallel.comm import Comm
from tests.harness.numerics import assert_close
from tests.harness.pool import run_ranks

TINY = Shape(layers=2, width=16, heads=4, inner=8, vocabulary=14, projected=3)


def test_the_search_finds_the_largest_that_fits_in_few_measurements() -> None:
    draw = random.Random(0)
    for _ in range(300):
        fixed, linear, square, step = draw.randrange(1000), draw.randrange(1, 100), draw.choice((0, 1, 3)), draw.choice((1, 8))
        budget, start = fixed + draw.randrange(1, 10**6), draw.randrange(1, 200)
        asked: list[int] = []

        def peak(size: int) -> int:
            asked.append(size)  # noqa: B023
            whole = -(-size // step) * step  # noqa: B023
            return fixed + linear * whole + square * whole * size  # noqa: B023

        found = largest(peak, budget, start)
        assert len(set(asked)) == len(asked) == len(found.peaks), "nothing is measured twice"
        assert found.peaks[found.size + 1] == peak(found.size + 1) > budget
        assert found.size == 0 or found.peaks[found.size] == peak(found.size) <= budget
        assert len(found.peaks) <= 2 * (found.size + start).bit_length() + 8, (budget, start, found)


def test_the_search_ends_where_peaks_jump() -> None:
    found = largest(lambda size: 10 if size <= 777 else 10**9, 100, 1)
    assert found.size == 777 and len(found.peaks) < 26
    assert largest(lambda size: 101, 100, 8).size == 0


def peaks(rank: int, world_size: int, side: str, sizes: list[tuple[int, int, int]]) -> list[int]:
    comm = Comm(dist.group.WORLD if world_size > 1 else None)
    return [step_peak(Apart(comm), SIDES[side], TINY._replace(layers=layers), *size) for layers, *size in sizes]


@pytest.mark.parametrize("ranks", (1, 2, 4))
def test_scores_of_rsa_are_divided_by_the_ranks(ranks: int) -> None:
    """A layer more costs B Z L^2 / P elements beside what grows with L: the second difference says how much, to the byte."""
    documents, lengths = 3, (32, 64, 96)
    sizes = [(layers, documents, length) for length in lengths for layers in (2, 3)]
    for found in [peaks(0, 1, "rsa", sizes)] if ranks == 1 else run_ranks(peaks, ranks, side="rsa", sizes=sizes):
        one, two, three = (found[i + 1] - found[i] for i in (0, 2, 4))
        assert three - 2 * two + one == 2 * 4 * documents * TINY.heads * lengths[0] ** 2 // ranks


def gradients(rank: int, world_size: int, side: str) -> dict[str, Any]:
    """Of a step in float64: the loss on this rank, and each gradient with what it is of the whole parameter."""
    job = make_double(Apart(Comm(dist.group.WORLD)), side)
    shard = job.shard()
    loss = job.backward(job.batch(shard), shard)
    found = {}
    for name, parameter in job.model.named_parameters():
        name = name.replace("inner.", "")
        found[name] = parameter.grad, job.tensor.kept.get(name)
    return {"loss": loss, "gradients": found}


def make_double(comm: Comm, side: str) -> Job:
    torch.manual_seed(0)
    model = Encoder(TINY.config(SIDES[side].mixer, 9)).double()
    return Job(SIDES[side], comm, model, Documents((0, 9, 18, 25)))


@pytest.mark.parametrize("side", ["megatron", "tensor", "rsa", "linformer"])
def test_every_side_is_the_same_step(side: str) -> None:
    """On two ranks, of a stream that they cannot divide evenly: the loss, and every gradient on both."""
    alone = make_double(Comm(None), "linformer" if side == "linformer" else "rsa")
    shard = alone.shard()
    assert shard.num_tokens == 25
    loss = alone.backward(alone.batch(shard), shard)
    results = run_ranks(gradients, 2, side=side)
    assert_close(torch.tensor(sum(result["loss"] for result in results)), torch.tensor(loss), "loss")
    for name, parameter in alone.model.named_parameters():
        assert parameter.grad is not None
        for rank, result in enumerate(results):
            gradient, kept = result["gradients"][name]
            whole = parameter.grad
            if kept is not None:
                whole = torch.cat([whole.narrow(kept.axis, r.start, r.stop - r.start) for r in kept.ranges], kept.axis)
            assert_close(gradient, whole, f"{name}, rank {rank}")


def test_what_one_rank_holds_of_the_parameters() -> None:
    job = make_job(Comm(None), SIDES["rsa"], TINY, 2, 8)
    count = sum(parameter.numel() for parameter in job.model.parameters())
    assert count == rsa.parameters(TINY)
    assert job.fixed == 16 * count + 4 * len(job.parameters), "parameter, gradient, two moments; a count of steps each"


def rows(sizes: dict[str, dict[int, int]], axis: Axis) -> list[dict[str, Any]]:
    return [
        {"side": side, "ranks": ranks, "axis": axis.name, "held": axis.held, "largest": size}
        for side, found in sizes.items()
        for ranks, size in found.items()
    ]


def test_ratios_absolute_and_a_rank() -> None:
    axis = Axis("batch", 96)
    table = rows({"megatron": {1: 8, 2: 12, 4: 20}, "rsa": {1: 8, 4: 30, 8: 60}}, axis)
    table += rows({"megatron": {4: 1000}, "rsa": {8: 1}}, Axis("length", 4))
    overall, equal = rsa.compare(table, "rsa", "megatron", axis)
    assert (overall.absolute, overall.ranks, overall.per_rank) == (3.0, 2.0, 1.5)
    assert equal is not None and (equal.absolute, equal.ranks) == (1.5, 1.0)
    assert rsa.best(rows({"megatron": {2: 12, 4: 12}}, axis), "megatron", axis)["ranks"] == 2, "more ranks that gain nothing"
    assert rsa.compare(rows({"megatron": {3: 5}, "rsa": {4: 5}}, axis), "rsa", "megatron", axis)[1] is None


def test_a_search_starts_where_fewer_ranks_point_to() -> None:
    axis = Axis("batch", 96)
    table = rows({"rsa": {1: 8, 2: 16}, "tensor": {2: 9}}, axis)
    assert rsa._start(table, "rsa", axis, 8) == 64
    assert rsa._start(table, "tensor", axis, 4) == round(9 * 2**0.6)
    assert rsa._start(table, "rsa", Axis("length", 96), 8) == rsa._start([], "rsa", axis, 1) == 0


def test_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.json"
    sizes = [f"--{name}={value}" for name, value in TINY._asdict().items()]
    arguments = ["--sequence-ranks", "2", "--tensor-ranks", "2", "--sides", "megatron", "rsa", "--documents", "2"]
    assert main(["rsa", *sizes, *arguments, "--length", "8", "--budget", "0.1", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert [(row["side"], row["axis"], row["held"]) for row in found["rows"]] == [
        (side, axis, held) for side in ("megatron", "rsa") for axis, held in (("length", 2), ("batch", 8))
    ]
    for row in found["rows"]:
        assert row["largest"] > 0 and row["peak_bytes"] <= found["budget_bytes"] < row["next_bytes"]
    printed = capsys.readouterr().out
    assert "most documents of 8 tokens: RSA on 2 ranks / TP 2019 on 2:" in printed
    assert "published, batch: RSA on 64 GPUs / TP on 12: 13.70x = 5.33x as many GPUs, 2.57x a GPU" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tensor-ranks", "3"], "--tensor-ranks 3 does not divide --heads 4"),
        (["--documents", "0"], "--documents is 0: give at least 1"),
        (["--width", "50"], r"encoder.hidden_size 50 must be a multiple of encoder.num_heads 4"),
        (["--width", "20"], "--width 20 / --heads 4 is odd"),
        (["--budget", "0"], "--budget is 0: give more"),
    ],
)
def test_mistakes_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(["rsa", *arguments])
