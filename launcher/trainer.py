"""A training run from its first step to its report."""

from __future__ import annotations

import functools
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longhaul.models.compiled import check_compiler, compile_token_local
from longhaul.models.errors import UserError
from longhaul.models.lm import LanguageModel
from longhaul.models.low_precision import check_fp8, convert_to_fp8
from longhaul.models.ops.segments import Documents
from longhaul.parallel.checkpoint import Checkpoints, SaveError
from longhaul.parallel.comm import Comm, Ledger
from longhaul.parallel.data import DataParallel
from longhaul.parallel.deepspeed import ZeroParallel
from longhaul.parallel.engine import TWO_LEVELS, SequenceParallel
from longhaul.parallel.expert import ExpertParallel
from longhaul.parallel.mesh import ParallelMesh
from longhaul.parallel.pipeline.layers import PipelineParallel
from longhaul.parallel.runtime import Runtime
from longhaul.parallel.tensor import TensorParallel

from .batches import stream_indices
from .config import TrainConfig
from .data import Data, load_data
from .engines import EngineNews, engine_arguments
from .expected import ExpectedTraffic, expected_traffic
from .facts import baselines, describe_run
from .finish import write_results
from .horizon import look_at_states
from .load import RESOLVED
from .metrics import Metrics, traffic_of
from .optimizer import learning_rate, make_optimizer, undecayed_names
from .parsing import to_yaml
from .pipelined import PipelinedStepper, stages_per_rank
from .planned.setup import planned_stepper
from .start import claim_folder, find_start, make_folder
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
        self.data = _load_on_every_machine(config, runtime)
        self.mesh = ParallelMesh(config.parallel.degrees(runtime.world_size), runtime.rank, runtime.device.type)
        self.ledger = Ledger()
        self.engine = SequenceParallel(
            Comm(self.mesh.sequence_group, self.ledger),
            **engine_arguments(config.parallel),
            tensor=Comm(self.mesh.tensor_group, self.ledger),
            levels=self._levels(),
        )
        if config.model.vocab_size < self.data.vocab_size:
            masks = " and one for the masks of data.prefix_length" if config.data.prefix_length else ""
            raise UserError(
                f"model.vocab_size {config.model.vocab_size} is smaller than the tokenizer's "
                f"{self.data.tokenizer.vocab_size}{masks}: raise it to at least {self.data.vocab_size}, best a multiple of 8."
            )
        torch.manual_seed(config.train.seed)  # the same initial weights on every process and any topology
        model = LanguageModel(config.model).to(runtime.device)
        if config.train.precision == "fp8":
            check_fp8(runtime.device)
            convert_to_fp8(model)
        if config.train.compile:
            check_compiler(runtime.device)
            compile_token_local(model)
        model.activation_checkpointing = config.train.activation_checkpointing
        model.activation_offload = config.train.activation_offload
        self.engine.check(*model.needs())
        if model.needs()[0]:
            self.engine.prepare(runtime.device)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.flops_per_token = model.flops_per_token(config.data.seq_length)
        undecayed = undecayed_names(model)
        self.pipeline = self._pipeline(model)
        tensor = TensorParallel(model, Comm(self.mesh.tensor_group, self.ledger))
        expert_groups = self.mesh.expert_group, self.mesh.expert_copies_group
        experts = ExpertParallel(model, *(Comm(group, self.ledger) for group in expert_groups))
        self.model: DataParallel
        if config.parallel.data_parallel_backend == "deepspeed":
            os.environ.setdefault("LOCAL_RANK", str(runtime.local_rank))  # DeepSpeed asks for it, however processes are started
            zero = config.parallel.zero_stage, config.parallel.zero_offload
            self.model = ZeroParallel(model, self.mesh, *zero, ledger=self.ledger)
        else:
            self.model = DataParallel(
                model,
                self.mesh,
                config.parallel.data_parallel_backend,
                blocks=tuple(model.layers),
                parameter_dtype=torch.bfloat16 if config.parallel.parameter_dtype == "bf16" else None,
                ledger=self.ledger,
                tensor=tensor,
                experts=experts,
                pipeline=self.pipeline,
            )
        self.optimizer = make_optimizer(model, config.optimizer, undecayed)
        self.model.drive(self.optimizer)
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

    def _levels(self) -> tuple[Comm, Comm] | None:
        """Groups inside and across nodes of this sequence group, if an engine may want them."""
        size = self.mesh.degrees.sequence
        inner = self.config.parallel.sequence_inner_size
        if inner is None:
            if not {self.config.parallel.exchange, self.config.parallel.attention} & TWO_LEVELS:
                return None
            inner = max(n for n in range(1, size + 1) if size % n == 0 and n <= self.runtime.local_world_size)
        inside, across = self.mesh.sequence_levels(inner)
        return Comm(inside, self.ledger), Comm(across, self.ledger)

    def _pipeline(self, model: LanguageModel) -> PipelineParallel | None:
        """The model narrowed to the layers of this process, if processes divide them."""
        parallel = self.config.parallel
        if parallel.pipeline_parallel_size == 1:
            return None
        each = stages_per_rank(self.config)
        comm = Comm(self.mesh.pipeline_group, self.ledger)
        how = parallel.pipeline_schedule, each, parallel.pipeline_split, self.config.data.seq_length
        return PipelineParallel(model, comm, *how)

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


def _load_on_every_machine(config: TrainConfig, runtime: Runtime) -> Data:
    """One process of each machine reads documents and fills the cache of tokens, then the others find it."""
    data: Data | None = None
    for turn in (True, False):
        error: UserError | None = None
        if (runtime.local_rank == 0) == turn:
            try:
                data = load_data(config.data)
            except UserError as mistake:
                error = mistake
        runtime.agree_on_error(error)
    assert data is not None
    return data
