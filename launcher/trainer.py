"""A training run from its first step to its report."""

from __future__ import annotations

import functools
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longhaul.models.errors import UserError
from longhaul.models.lm import LanguageModel
from longhaul.models.ops.segments import Documents
from longhaul.parallel.checkpoint import Checkpoints, SaveError
from longhaul.parallel.comm import Ledger
from longhaul.parallel.mesh import ParallelMesh
from longhaul.parallel.runtime import Runtime

from .batches import stream_indices
from .build import build, make_engine
from .config import TrainConfig
from .engines import EngineNews
from .expected import ExpectedTraffic, expected_traffic
from .facts import baselines, describe_run
from .finish import write_results
from .horizon import look_at_states
from .load import RESOLVED
from .metrics import Metrics, traffic_of
from .optimizer import learning_rate
from .parsing import to_yaml
from .pipelined import PipelinedStepper
from .planned.setup import planned_stepper
from .start import check_vocabulary, claim_folder, find_start, load_on_every_machine, make_folder
from .state import collect, fingerprint, restore
from .step import Stepper


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    """Steps done since the beginning of the run, sessions before this one included."""
    stop_signal: int = 0
    """What stopped it before its last step; 0 if nothing did."""
    held_out_loss: float | None = None
    """Nats per token after the last step, if something is held out."""


class Trainer:
    """Everything of a run on one process. Every process makes one and calls `run`.

    Args:
        config: the run; derived numbers may still be open.
        runtime: this process among the others.
        stop_signal: asked at every boundary; a number above 0 on any process ends the run after saving.

    Raises:
        UserError: something does not fit together; on every process alike.
    """

    def __init__(self, config: TrainConfig, runtime: Runtime, stop_signal: Callable[[], int] = lambda: 0) -> None:
        self.config = config = config.resolve(runtime.world_size)
        self.runtime, self.stop_signal = runtime, stop_signal
        self.folder = Path(config.checkpoint.folder)
        runtime.on_main(lambda: make_folder(self.folder))
        torch.use_deterministic_algorithms(config.train.deterministic)
        self.data = load_on_every_machine(config, runtime)
        self.mesh = ParallelMesh(config.parallel.degrees(runtime.world_size), runtime.rank, runtime.device.type)
        self.ledger = Ledger()
        self.engine = make_engine(config, self.mesh, runtime, self.ledger)
        check_vocabulary(config, self.data)
        torch.manual_seed(config.train.seed)
        self.model, self.optimizer, self.pipeline, self.parameters, self.flops_per_token = build(
            config, self.make_model(), self.mesh, self.engine, runtime
        )
        options: dict[str, Any] = {
            "clip": config.optimizer.clip,
            "precision": "fp32" if config.train.precision == "fp32" else "bf16",
            "carry_state": config.data.carry_state,
            "stream_tokens": config.train.stream_tokens,
            "stream_truncated": config.train.stream_truncated,
            "stop_signal": stop_signal,
        }
        self.planned = planned_stepper(config, self.data, self.model, self.mesh, self.engine, runtime, self.optimizer, options)
        stepper: Any = Stepper
        if self.pipeline is not None:
            stepper = functools.partial(PipelinedStepper, self.pipeline, config.streams_per_group)
        self.stepper: Stepper = self.planned or stepper(self.model, self.engine, runtime, self.optimizer, **options)
        self.checkpoints = Checkpoints(self.folder, runtime, config.checkpoint.keep, config.checkpoint.background)
        self.fingerprint = fingerprint(config, self.data)
        self.step = 0
        self.consumed = 0
        """Samples read by all sessions of the run: the position in the data."""
        self.messages: list[str] = []
        self.expected = self._expected_traffic()
        self._resume()
        runtime.on_main(lambda: claim_folder(config, self.parameters))

    def make_model(self) -> LanguageModel:
        """The model whole, but without memory: its initial values are made part by part, the same on any topology. Or, of a
        class that overrides this, with values of its own, alike on every process."""
        with torch.device("meta"):
            return LanguageModel(self.config.model)

    def _expected_traffic(self) -> ExpectedTraffic | None:
        """What a step should receive, where the streams of a step lie in one layout and run once."""
        config = self.config
        if self.engine.comm.size == 1 or config.train.stream_tokens is not None or config.parallel.planner.enabled:
            return None
        if self.pipeline is not None:
            return None
        return expected_traffic(
            self.model,
            self.engine,
            self.data.train.stream(0),
            self.runtime.device,
            bf16=config.train.precision != "fp32",
            keep_state=config.data.carry_state,
            recomputes=config.train.activation_checkpointing != "none",
        )

    def _resume(self) -> None:
        checkpoint, self.messages = self.runtime.on_main(lambda: find_start(self.config, self.fingerprint))
        if checkpoint is None:
            return
        self.stepper.state = restore(
            checkpoint,
            self.model.model,
            self.optimizer,
            self.runtime.rank,
            self.runtime.device,
            carried_like=self._state_of_one_token,
            cuts=self.model.cuts,
        )
        self.step, self.consumed = checkpoint.step, int(checkpoint.facts["samples"])
        if self.planned is not None and not self.planned.planner.restore(checkpoint.facts.get("planner")):
            self.messages.append("the checkpoint has no costs learnt for this model and cluster: the planner learns anew")
        if checkpoint.path.resolve().parent == self.folder.resolve():
            self.checkpoints.last_good = self.folder / checkpoint.path.name
        self.messages.append(f"going on from {checkpoint.path}, {self.consumed} samples read")

    @torch.no_grad()
    def _state_of_one_token(self) -> Any:
        shard = self.engine.shard(Documents((0, 1)), self.runtime.device, keep_state=True)
        tokens = torch.zeros(shard.num_tokens, dtype=torch.int64, device=self.runtime.device)
        return self.model(tokens, shard)[1]

    def run(self) -> Outcome:
        """Train to the last step, or until a signal; then save, evaluate and report."""
        steps = self.config.train.steps
        with Metrics(
            self.config.metrics,
            self.folder,
            is_main=self.runtime.is_main,
            world_size=self.runtime.world_size,
            total_steps=steps,
            resumed_step=self.step,
            flops_per_token=self.flops_per_token,
            device=self.runtime.device,
        ) as metrics:
            metrics.record(**describe_run(self.config, self.data, self.parameters, self.runtime.world_size))
            if self.runtime.is_main:
                metrics.record(baselines=baselines(self.data))
            stages = self.pipeline.describe() if self.pipeline is not None else []
            for name, module in self.model.model.named_modules():
                if getattr(module, "inexact", None):
                    metrics.message(f"warning: {name}: {module.inexact}, so results depend on where streams are cut")
            for message in (*self.mesh.describe().splitlines(), *stages, *self.messages):
                metrics.message(message)
            news = EngineNews(self.engine, metrics)
            news.tell()
            stopped = self.runtime.maximum(self.stop_signal())
            loss: float | None = None
            while self.step < steps and not stopped:
                stopped = self._one_step(metrics)
                if metrics.due(self.step):
                    news.tell()
                every = self.config.train.eval_every
                if not stopped and every and self.step % every == 0 and self.step < steps:
                    loss, stopped = self._evaluate(metrics)
                every = self.config.metrics.horizon_every
                if not stopped and every and self.step % every == 0:
                    self._measure_horizon(metrics)
                every = self.config.checkpoint.every
                if not stopped and every and self.step % every == 0 and self.step < steps:
                    self._save(metrics, final=False)
            if self.step < steps:
                self._save(metrics, final=True)
                metrics.close(f"stopped by {signal.Signals(stopped).name}")
                return Outcome(self.step, stopped)
            # Saved before it is judged: an evaluation may take long, and it too may be interrupted.
            self._save(metrics, final=True)
            loss, stopped = self._evaluate(metrics)
            metrics.close(f"stopped by {signal.Signals(stopped).name}" if stopped else "finished")
        if self.runtime.is_main and not stopped:
            write_results(self.folder, self.data)
        return Outcome(self.step, stopped, loss)

    def _one_step(self, metrics: Metrics) -> int:
        config = self.config
        metrics.start_step()
        self.ledger.reset()
        batch = config.train.global_batch_size
        assert batch is not None, "resolved"
        with metrics.loading():
            if self.planned is not None:
                streams = self.planned.read(self.consumed)
            else:
                indices = stream_indices(self.consumed, batch, self.mesh.data_rank, self.mesh.degrees.data)
                streams = [self.data.train.stream(index) for index in indices]
        rate = learning_rate(config.optimizer, self.step, config.train.steps)
        result = self.stepper.train(streams, rate)
        if not math.isfinite(result.loss) or not math.isfinite(result.gradient_norm):
            self._settle(metrics)
            raise UserError(
                f"Step {self.step + 1} gave loss {result.loss} and gradient norm {result.gradient_norm}, so the run "
                f"stopped without saving it: lower optimizer.lr ({config.optimizer.lr:g}) or raise "
                f"optimizer.warmup_steps; the last good checkpoint is {self.checkpoints.last_good or 'none'}."
            )
        self.step += 1
        self.consumed += batch
        metrics.log(
            self.step,
            tokens=batch * config.data.seq_length,
            loss=result.loss,
            grad_norm=result.gradient_norm,
            learning_rate=rate,
            traffic=traffic_of(self.ledger.counts),
            formula=None if self.expected is None else functools.partial(self.expected.of, streams),
            extra=result.extra,
        )
        return result.stop_signal

    def _evaluate(self, metrics: Metrics) -> tuple[float | None, int]:
        if self.data.validation is None:
            return None, 0
        with metrics.outside("evaluation"):
            loss, weight, stopped = self.stepper.evaluate(
                self.data.validation, self.mesh.data_rank, self.mesh.degrees.data
            )
        if stopped:
            return None, stopped
        metrics.log_evaluation(self.step, loss, int(weight))
        return loss, 0

    def _measure_horizon(self, metrics: Metrics) -> None:
        held_out = self.data.validation
        stream = held_out[0] if held_out is not None and len(held_out) else self.data.train.stream(0)
        with metrics.outside("effective horizon"):
            found = look_at_states(
                self.model,
                self.engine,
                stream,
                self.runtime.device,
                self.stepper.bf16,
                self.config.train.stream_tokens,
            )
        if found.horizons is not None:
            metrics.log_horizon(self.step, *found.horizons)
        if found.norm is not None:
            metrics.log_state_norm(self.step, found.norm)

    def _save(self, metrics: Metrics, final: bool) -> None:
        if not self.config.checkpoint.every or self.checkpoints.last_good == self.folder / f"step_{self.step}":
            return
        started = time.perf_counter()
        facts = {"samples": self.consumed, "fingerprint": self.fingerprint, "world_size": self.runtime.world_size}
        if self.planned is not None:
            facts["planner"] = self.planned.planner.state()
        with metrics.outside("checkpoint"):
            state = collect(
                *self.model.gathered(self.optimizer),
                self.stepper.state,
                self.runtime.rank,
                self.runtime.device,
                self.model.cuts,
            )
            self._settle(metrics)
            try:
                self.checkpoints.save(self.step, state, facts, {RESOLVED: to_yaml(self.config)})
                if final:
                    self.checkpoints.wait()
            except SaveError as error:
                if final:
                    raise
                metrics.message(_goes_on(error))
        if final:
            seconds = time.perf_counter() - started
            metrics.message(f"saved {self.folder / f'step_{self.step}'} in {seconds:.1f} s")

    def _settle(self, metrics: Metrics) -> None:
        """Wait for the save under way. A failed one is no reason to lose the steps since: the next may succeed."""
        try:
            self.checkpoints.wait()
        except SaveError as error:
            metrics.message(_goes_on(error))


def _goes_on(error: SaveError) -> str:
    return f"warning: {error} Training goes on until the next checkpoint."
