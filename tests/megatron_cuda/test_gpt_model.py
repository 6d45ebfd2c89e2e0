"""Megatron's schedules, DDP and optimizers over a GPTModel of our mixers: every division takes the step of one process."""

import importlib.util
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness.numerics import assert_close
from tests.megatron_cuda.job import CASES, MICRO_BATCHES

ROOT = Path(__file__).parents[2]
PINNED = re.search(r"^megatron-core==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
assert PINNED is not None

pytestmark = [
    pytest.mark.megatron_job,
    pytest.mark.skipif(
        importlib.util.find_spec("megatron") is None or version("megatron-core") != PINNED[1],
        reason=f"the stand-in for torch.cuda fits megatron-core {PINNED[1]} only",
    ),
]

Results = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each rank of each case found."""
    folder = tmp_path_factory.mktemp("megatron")
    job = [sys.executable, "-m", "tests.megatron_cuda", str(folder)]
    done = subprocess.run(job, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        name: [torch.load(folder / f"{name}.{rank}.pt", weights_only=False) for rank in range(case.world_size)]
        for name, case in CASES.items()
    }


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if name != case.reference])
def test_every_rank_takes_the_step_of_one_process(name: str, results: Results) -> None:
    (whole,) = results[CASES[name].reference]
    seen: list[list[torch.Tensor]] = [[] for _ in range(MICRO_BATCHES)]
    for rank, found in enumerate(results[name]):
        for index, (places, losses) in enumerate(found["losses"]):
            assert_close(losses, whole["losses"][index][1][places], f"losses of micro-batch {index}, rank {rank}")
            seen[index].append(places)
        for kind in ("gradients", "parameters"):
            reference = {part.name: value for part, value in whole[kind]}
            for part, value in found[kind]:
                assert_close(value, part.of(reference[part.name]), f"{kind} of {part.name}, rank {rank}")
        norm, expected = (torch.tensor(values["norm"]) for values in (found, whole))
        assert_close(norm, expected, f"gradient norm, rank {rank}")
    for index in range(MICRO_BATCHES):
        assert torch.equal(torch.cat(seen[index]).unique(), whole["losses"][index][0]), "a token's loss was not compared"
    held = {part.name for found in results[name] for part, _ in found["parameters"]}
    assert held == {part.name for part, _ in whole["parameters"]}


def test_one_process_has_a_gradient_of_everything(results: Results) -> None:
    (whole,) = results["one"]
    for part, gradient in whole["gradients"]:
        assert gradient.abs().max() > 0, part.name
