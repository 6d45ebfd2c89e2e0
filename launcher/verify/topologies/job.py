"""One case on one rank: the trainer's run, compared with that of one process.

Compared are the gradient of every parameter at the first step and every parameter after the last, as far as they are held here
(and all ranks together hold all of each), losses and gradient norms of all steps, the held-out loss, and the messages of a step
with recomputation beside those of the same step without.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longhaul.launcher.config import (
    CheckpointConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    TrainingConfig,
)
from longhaul.launcher.data import DataConfig, Stream
from longhaul.launcher.metrics import MetricsConfig
from longhaul.launcher.planned.config import PlannerConfig
from longhaul.launcher.trainer import Trainer
from longhaul.parallel.data import DataParallel
from longhaul.parallel.deepspeed import ZeroParallel
from longhaul.parallel.pieces import Pieces, as_pieces, local_part
from longhaul.parallel.runtime import Runtime

from ..cells import TOLERANCE
from . import models
from .cases import ADAMW, BACKENDS, CHECKPOINTING, ENGINES, OPTIONS, Case

STEPS = 20
SEQ_LENGTH = 101
DOCUMENTS = 24
RATES = {"fp64": {"mom": 0.003, "gated_deltanet": 0.005}, "fp32": {"gated_deltanet": 0.03}}
RATE = {"fp64": 0.01, "fp32": 0.1}  # of the other models
FELL = 0.2  # nats by which the reference must learn, or the comparison sees no training
FLOOR = 1e-30

Findings = dict[str, tuple[float, float]]


class Asked(NamedTuple):
    """A case, and a folder for documents and references that the ranks of this machine share."""

    case: Case
    folder: str

    @property
    def reference(self) -> tuple[str, ...]:
        """Of the case."""
        return self.case.reference


class Outcome(NamedTuple):
    """A run, as far as it is held here: pieces of tensors by name, each where it begins in the whole."""

    gradients: dict[str, list[tuple[tuple[int, ...], Tensor]]]
    parameters: dict[str, list[tuple[tuple[int, ...], Tensor]]]
    losses: list[float]
    norms: list[float]
    held_out: float
    traffic: list[dict[str, tuple[int, int]]]
    """Of a step as the case asks, and of the same without recomputation; empty if it asks for none."""


def write_documents(folder: Path) -> None:
    """A corpus of awkward lengths: documents shorter than a prefix, and longer than a stream."""
    if (folder / "corpus").exists():
        return
    scratch = Path(tempfile.mkdtemp(dir=folder))
    for index in range(DOCUMENTS):
        (scratch / f"{index}.txt").write_text((f"{index}: to be or not to be. " * 12)[: 2 + 37 * index % 140])
    with contextlib.suppress(OSError):  # another pool was faster
        scratch.rename(folder / "corpus")


def configured(case: Case, folder: Path, run: Path) -> TrainConfig:
    """The run of a case.

    Args:
        folder: of documents.
        run: of the run itself.

    Raises:
        UserError: it makes no sense.
    """
    degrees, option = case.degrees, OPTIONS[case.option]
    parallel = {**BACKENDS[case.backend], **ENGINES[case.engines], **option.get("parallel", {})}
    if "planner" in parallel:
        parallel["planner"] = PlannerConfig(**parallel["planner"])  # type: ignore[arg-type]
    if case.schedule:
        parallel["pipeline_schedule"] = case.schedule
    # Large enough to learn in 20 steps, small enough that steps do not magnify rounding a millionfold.
    rate = RATES[case.dtype].get(case.model, RATE[case.dtype])
    optimizer = OptimizerConfig(name="sgd", lr=rate, min_lr=0.0, clip=0.0, schedule="constant", warmup_steps=0)
    if case.optimizer == ADAMW:
        optimizer = OptimizerConfig(lr=1e-2, min_lr=1e-3, clip=1.0, warmup_steps=4)
    data: dict[str, Any] = {"prefix_length": 5, "mask_rate": 0.4, **option.get("data", {})}
    return TrainConfig(
        model=models.tiny(case.model),
        data=DataConfig(
            paths=(str(folder / "corpus"),),
            seq_length=SEQ_LENGTH,
            validation_fraction=0.2,
            validation_tokens=2 * SEQ_LENGTH - 30,
            cache_dir=str(folder / "cache"),
            **data,
        ),
        parallel=ParallelConfig(
            data_parallel_size=degrees.data,
            pipeline_parallel_size=degrees.pipeline,
            sequence_parallel_size=degrees.sequence,
            tensor_parallel_size=degrees.tensor,
            expert_parallel_size=degrees.expert,
            **parallel,  # type: ignore[arg-type]
        ),
        optimizer=optimizer,
        # One step more than is run: a run that is stopped writes no report.
        train=TrainingConfig(
            steps=STEPS + 1,
            global_batch_size=case.streams,
            device="cpu",
            **{**CHECKPOINTING[case.checkpointing], **option.get("train", {})},  # type: ignore[arg-type]
        ),
        checkpoint=CheckpointConfig(folder=str(run), every=0, resume="never"),
        metrics=MetricsConfig(display="none"),
    )


class _Run(Trainer):
    """A trainer that makes the model of a case, and keeps what a case compares."""

    def __init__(self, case: Case, config: TrainConfig, runtime: Runtime) -> None:
        self.case = case
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.gradients: dict[str, list[tuple[tuple[int, ...], Tensor]]] = {}
        self.streams: Sequence[Stream] = ()
        super().__init__(config, runtime, lambda: 15 * (len(self.losses) + 1 >= STEPS))
        self._train, self.stepper.train = self.stepper.train, self._note  # type: ignore[method-assign]
        self._update, self.optimizer.step = self.optimizer.step, self._keep  # type: ignore[method-assign]

    def make_model(self) -> Any:
        own = models.make(self.case.model, self.case.dtype)
        return super().make_model() if own is None else own

    def _keep(self, *args: Any, **kwargs: Any) -> Any:
        if not self.losses:  # several times a step, under ZeRO
            self.gradients |= held(self.model, gradient=True)
        return self._update(*args, **kwargs)

    def _note(self, streams: Sequence[Stream], rate: float) -> Any:
        result = self._train(streams, rate)
        self.losses.append(result.loss)
        self.norms.append(result.gradient_norm)
        self.streams = streams
        return result

    def outcome(self) -> Outcome:
        """Run, and evaluate."""
        self.run()
        assert len(self.losses) == STEPS and self.data.validation is not None
        self.stepper.stop_signal = lambda: 0
        parameters = held(self.model, gradient=False)
        recomputes = self.case.checkpointing != "none" and self.case.option != "streamed"
        traffic = [self._traffic(mode) for mode in (self.case.checkpointing, "none")] if recomputes else []
        held_out, weight, _ = self.stepper.evaluate(self.data.validation, self.mesh.data_rank, self.mesh.degrees.data)
        assert weight > 0
        return Outcome(self.gradients, parameters, self.losses, self.norms, held_out, traffic)

    def _traffic(self, checkpointing: str) -> dict[str, tuple[int, int]]:
        """Calls and messages of the last step, taken once more at a rate of zero, by label and collective.

        Not bytes: in its backward Ulysses has its inputs travel with the gradients where they were not kept.
        """
        model: Any = self.model.model
        options = CHECKPOINTING[checkpointing]
        model.activation_checkpointing = options["activation_checkpointing"]
        model.activation_offload = options.get("activation_offload", False)
        self.ledger.reset()
        self._train(self.streams, 0.0)
        counts = self.ledger.counts.items()
        return {f"{label}, {kind}": (count.calls, count.messages) for (label, kind), count in counts}


def held(model: DataParallel, gradient: bool) -> dict[str, list[tuple[tuple[int, ...], Tensor]]]:
    """Copies of what this rank holds of every parameter or of its gradient, as the optimizer is given them."""
    found = {}
    for name, parameter in model.model.named_parameters():
        if isinstance(model, ZeroParallel):
            found.update(_held_by_zero(model, name, parameter, gradient))
            continue
        tensor = parameter.grad if gradient else parameter
        assert tensor is not None, f"{name} has no gradient"
        pieces = as_pieces(tensor.detach(), model.cuts(name))
        if isinstance(pieces, Pieces):
            found[name] = [(piece.offsets, piece.tensor.clone()) for piece in pieces.held]
        else:
            local, offsets = local_part(pieces)
            found[name] = [(offsets, local.clone())] if local.numel() else []
    return found


def _held_by_zero(model: ZeroParallel, name: str, parameter: nn.Parameter, gradient: bool) -> dict[str, Any]:
    """Whole parameters; of gradients the part that this rank steps, in the parameter as one row of numbers."""
    if not gradient:
        from deepspeed.utils import safe_get_full_fp32_param

        whole = safe_get_full_fp32_param(parameter)
        return {name: [((0,) * whole.ndim, whole.detach().clone())]}
    place = model.flat(parameter)
    if place is None or not place[2]:
        return {name: []}
    flat, offset, length, start = place
    if flat.grad is None:
        return {}  # of a group whose turn comes later in the step
    return {name: [((start,), flat.grad[offset : offset + length].clone())]}


def check(asked: Asked, runtime: Runtime) -> Findings:
    """All findings of a case on this rank.

    Raises:
        UserError: it was refused.
    """
    case, folder = asked.case, Path(asked.folder)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as the case, also where there are GPUs
    scratch = runtime.on_main(lambda: _prepare(folder))
    try:
        run = _Run(case, configured(case, folder, scratch), runtime)  # refused here, if at all
        if case.refused:
            return {"steps that should have been refused": (1.0, 0.0)}
        reference = _reference(case, folder, scratch, runtime)
        found = run.outcome()
    finally:
        if runtime.is_main:
            shutil.rmtree(scratch, ignore_errors=True)
    errors = {
        "losses": error(torch.tensor(found.losses), torch.tensor(reference.losses)),
        "gradient norms": error(torch.tensor(found.norms), torch.tensor(reference.norms)),
        "held-out loss": error(torch.tensor(found.held_out), torch.tensor(reference.held_out)),
    }
    errors |= _errors("gradient of {}, step 1", found.gradients, reference.gradients)
    errors |= _errors(f"{{}} after {STEPS} steps", found.parameters, reference.parameters)
    findings = {name: (value, TOLERANCE[case.dtype]) for name, value in errors.items()}
    findings |= _missing(found, reference, runtime)
    return findings | (_differences(*found.traffic) if found.traffic else {})


def _reference(case: Case, folder: Path, scratch: Path, runtime: Runtime) -> Outcome:
    """What one process makes of the case; made by the first rank if it lies nowhere yet."""
    path = folder / "references" / ("-".join(case.reference) + ".pt")
    runtime.on_main(lambda: _make_reference(case, path, folder, scratch))
    return Outcome(*torch.load(path))


def _missing(found: Outcome, reference: Outcome, runtime: Runtime) -> Findings:
    """Elements that no rank holds."""
    findings: Findings = {}
    for what, own, whole in (
        ("gradient", found.gradients, reference.gradients),
        ("parameter", found.parameters, reference.parameters),
    ):
        masks = {name: torch.zeros_like(pieces[0][1], dtype=torch.float64) for name, pieces in whole.items()}
        for name, pieces in own.items():
            for offsets, piece in pieces:
                _place(masks[name], offsets, piece).fill_(1.0)
        counts = runtime.comm().all_reduce(torch.cat([mask.flatten() for mask in masks.values()]), "verify").wait()
        findings[f"numbers of a {what} that no rank holds"] = (float((counts == 0).sum()), 0.0)
    return findings


def _prepare(folder: Path) -> Path:
    """Documents, if there are none yet, and a folder for one run."""
    write_documents(folder)
    return Path(tempfile.mkdtemp(dir=folder, prefix="run-"))


def _make_reference(case: Case, path: Path, folder: Path, scratch: Path) -> None:
    """The same model and streams in one process, with nothing on; if it is not there yet."""
    if path.exists():
        return
    alone = Case(case.model, optimizer=case.optimizer, dtype=case.dtype)
    config = configured(alone, folder, scratch)
    config = replace(config, train=replace(config.train, global_batch_size=case.streams))
    outcome = _Run(alone, config, Runtime(device="cpu")).outcome()
    first, last = (sum(part) / len(part) for part in (outcome.losses[:3], outcome.losses[-3:]))
    assert last < first - FELL, f"the reference of {case.key} did not learn: {outcome.losses}"
    path.parent.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        torch.save(tuple(outcome), file)
    Path(file.name).replace(path)


def _place(whole: Tensor, offsets: Iterable[int], piece: Tensor) -> Tensor:
    """The part of a whole tensor that a piece is; a row of numbers is of the flat one."""
    if piece.ndim != whole.ndim:
        whole = whole.view(-1)
    for axis, (offset, length) in enumerate(zip(offsets, piece.shape)):
        whole = whole.narrow(axis, offset, length)
    return whole


def error(actual: Tensor, expected: Tensor) -> float:
    """RMS over RMS."""
    scale = max(expected.double().square().mean().sqrt().item(), FLOOR)
    return (actual.double() - expected.double()).square().mean().sqrt().item() / scale


def _errors(title: str, found: dict[str, Any], whole: dict[str, Any]) -> dict[str, float]:
    """Of every piece held here, over the RMS of the whole tensor."""
    errors = {}
    for name, pieces in found.items():
        expected = whole[name][0][1].double()
        scale = max(expected.square().mean().sqrt().item(), FLOOR)
        worst = 0.0
        for offsets, piece in pieces:
            difference = (piece.double() - _place(expected, offsets, piece)).square().mean().sqrt().item()
            worst = max(worst, difference / scale) if difference == difference else float("inf")
        errors[title.format(name)] = worst
    return errors


def _differences(found: dict[str, tuple[int, int]], expected: dict[str, tuple[int, int]]) -> Findings:
    """Messages that recomputation sends more, or fewer, by label."""
    findings: Findings = {}
    for label in sorted({*found, *expected}):
        calls, wanted = found.get(label, (0, 0)), expected.get(label, (0, 0))
        change = max(abs(a - b) for a, b in zip(calls, wanted))
        findings[f"messages of recomputation: {label}"] = (float(change), 0.0)
    return findings
