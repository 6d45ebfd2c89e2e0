"""The main job on several topologies is one job: gradients, norms and parameters agree, whatever the ranks."""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from longhaul.launcher.parsing import parse
from longhaul.launcher.trainer import Trainer
from longhaul.parallel.runtime import Runtime
from longhaul.parallel.tensor import local_ranges
from tests.harness.numerics import assert_close
from tests.harness.pool import run_ranks

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
STEPS = 20
TOPOLOGIES = {  # name -> data, sequence, tensor
    "sp1": (1, 1, 1),
    "sp2": (1, 2, 1),
    "sp4": (1, 4, 1),
    "dp2": (2, 1, 1),
    "dp2 x sp2": (2, 2, 1),
    "tp2": (1, 1, 2),
    "tp2 x sp2": (1, 2, 2),
    "dp2 x tp2": (2, 1, 2),
}


def full(trainer: Trainer, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A parameter of this name, or its gradient, put together from what ranks hold."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    whole = whole.detach().clone()
    tensor_parallel = trainer.model.tensor
    kept = tensor_parallel.kept.get(name)
    if kept is None:
        return whole
    parts = whole.new_zeros(kept.shape)
    for view, held in local_ranges(whole, kept):
        assert held is not None
        parts.narrow(kept.axis, held.start, held.stop - held.start).copy_(view / held.sharing)
    return tensor_parallel.comm.all_reduce(parts, "test").wait()


def job(rank: int, world_size: int, folder: str, overrides: list[str]) -> dict[str, Any]:
    """Train a few steps of the quickstart on shorter streams; what every rank sees of it."""
    arguments = ["--config", str(QUICKSTART), "--checkpoint.folder", folder, "--checkpoint.resume", "never"]
    arguments += ["--data.seq_length", "509", "--data.validation_tokens", "2000", "--train.global_batch_size", "2"]
    arguments += ["--train.steps", str(STEPS), "--optimizer.schedule", "constant", "--optimizer.warmup_steps", "0"]
    arguments += ["--metrics.tensorboard", "false", *overrides]
    with contextlib.redirect_stdout(io.StringIO()):  # a rank's lines would fall between pytest's own
        return train(Trainer(parse(arguments), Runtime(rank, world_size, device="cpu")))


def train(trainer: Trainer) -> dict[str, Any]:
    first: dict[str, torch.Tensor] = {}
    clip, step = trainer.model.clip_gradients, trainer.stepper.train
    norms, losses = [], []

    def keep_gradients(largest: float) -> torch.Tensor:
        if not first:
            first.update({name: full(trainer, name, p.grad) for name, p in trainer.model.model.named_parameters()})
        return clip(largest)

    def keep_results(streams: Any, rate: float) -> Any:
        result = step(streams, rate)
        norms.append(result.gradient_norm)
        losses.append(result.loss)
        return result

    trainer.model.clip_gradients, trainer.stepper.train = keep_gradients, keep_results
    trainer.run()
    parameters = {name: full(trainer, name, p) for name, p in trainer.model.model.named_parameters()}
    return {"first": first, "norms": norms, "losses": losses, "parameters": parameters}


def outcome(topology: str, folder: Path, *overrides: str) -> dict[str, Any]:
    data, sequence, tensor = TOPOLOGIES[topology]
    degrees = ["--parallel.data_parallel_size", str(data), "--parallel.sequence_parallel_size", str(sequence)]
    degrees += ["--parallel.tensor_parallel_size", str(tensor)]
    results = run_ranks(job, data * sequence * tensor, timeout=180, folder=str(folder), overrides=[*degrees, *overrides])
    for result in results[1:]:
        assert result["norms"] == results[0]["norms"] and result["losses"] == results[0]["losses"]
    return results[0]


PLAIN_SGD = ("--optimizer.name", "sgd", "--optimizer.lr", "0.05", "--optimizer.min_lr", "0", "--optimizer.clip", "0")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return outcome("sp1", tmp_path_factory.mktemp("reference"), *PLAIN_SGD)


SAME = [("sp2", "fsdp"), ("sp4", "fsdp"), ("sp4", "ddp"), ("dp2", "ddp"), ("dp2 x sp2", "fsdp")]
SAME += [("tp2", "fsdp"), ("tp2 x sp2", "fsdp"), ("dp2 x tp2", "ddp")]


@pytest.mark.parametrize("topology, backend", SAME)
def test_plain_sgd_is_the_same_job(topology: str, backend: str, one_process: dict[str, Any], tmp_path: Path) -> None:
    found = outcome(topology, tmp_path, *PLAIN_SGD, "--parallel.data_parallel_backend", backend)
    for name, gradient in one_process["first"].items():
        assert_close(found["first"][name], gradient, f"gradient of {name} at step 1")
    assert_close(torch.tensor(found["norms"]), torch.tensor(one_process["norms"]), "gradient norms")
    for name, parameter in one_process["parameters"].items():
        assert_close(found["parameters"][name], parameter, f"{name} after {STEPS} steps")
    assert one_process["losses"][-1] < one_process["losses"][0] - 0.3, "the comparison saw no training"


def test_the_adamw_curve_is_the_same(tmp_path: Path) -> None:
    one, four = (outcome(topology, tmp_path / topology)["losses"] for topology in ("sp1", "sp4"))
    assert max(abs(a - b) for a, b in zip(one, four)) < 2e-3
    assert one[-1] < one[0] - 0.5


ENGINES = [
    ("ring", "ring", "zigzag"),
    ("hierarchical", "usp", "contiguous"),
    ("auto", "ulysses", "contiguous_per_document"),
]


@pytest.mark.parametrize("exchange, attention, layout", ENGINES, ids=["-".join(names) for names in ENGINES])
def test_any_engine_is_the_same_job(
    exchange: str, attention: str, layout: str, one_process: dict[str, Any], tmp_path: Path
) -> None:
    names = ("--parallel.exchange", exchange, "--parallel.attention", attention, "--parallel.layout", layout)
    options = (*names, "--parallel.sequence_inner_size", "2", "--train.steps", "2")
    found = outcome("sp4", tmp_path, *PLAIN_SGD, *options)
    for name, gradient in one_process["first"].items():
        assert_close(found["first"][name], gradient, f"gradient of {name} at step 1")
    assert_close(torch.tensor(found["norms"]), torch.tensor(one_process["norms"][:2]), "gradient norms")
