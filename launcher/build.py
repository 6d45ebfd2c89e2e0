"""From a configuration to what a process trains: its engines, its part of the model, its optimizer."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from longhaul.models.compiled import check_compiler, compile_token_local
from longhaul.models.lm import LanguageModel
from longhaul.models.low_precision import check_fp8, convert_to_fp8
from longhaul.parallel.comm import Comm, Ledger
from longhaul.parallel.data import DataParallel
from longhaul.parallel.deepspeed import ZeroParallel
from longhaul.parallel.engine import TWO_LEVELS, SequenceParallel
from longhaul.parallel.expert import ExpertParallel
from longhaul.parallel.initial import Initialiser
from longhaul.parallel.mesh import ParallelMesh
from longhaul.parallel.pipeline.layers import PipelineParallel
from longhaul.parallel.runtime import Runtime
from longhaul.parallel.tensor import TensorParallel

from .config import TrainConfig
from .engines import engine_arguments
from .optimizer import make_optimizer, undecayed_names
from .pipelined import stages_per_rank
from .stage_costs import measured_costs


class Built(NamedTuple):
    """A process's part of the model, and what is known of the whole: `parameters` and `flops_per_token`."""

    model: DataParallel
    optimizer: torch.optim.Optimizer
    pipeline: PipelineParallel | None
    parameters: int
    flops_per_token: int


def make_engine(config: TrainConfig, mesh: ParallelMesh, runtime: Runtime, ledger: Ledger) -> SequenceParallel:
    """How streams are spread over this process's sequence group."""
    return SequenceParallel(
        Comm(mesh.sequence_group, ledger),
        **engine_arguments(config.parallel),
        tensor=Comm(mesh.tensor_group, ledger),
        levels=_levels(config, mesh, runtime, ledger),
    )


def _levels(config: TrainConfig, mesh: ParallelMesh, runtime: Runtime, ledger: Ledger) -> tuple[Comm, Comm] | None:
    """Groups inside and across nodes of this sequence group, if an engine may want them."""
    size, inner = mesh.degrees.sequence, config.parallel.sequence_inner_size
    if inner is None:
        if not {config.parallel.exchange, config.parallel.attention} & TWO_LEVELS:
            return None
        inner = max(n for n in range(1, size + 1) if size % n == 0 and n <= runtime.local_world_size)
    inside, across = mesh.sequence_levels(inner)
    return Comm(inside, ledger), Comm(across, ledger)


def build(
    config: TrainConfig, model: LanguageModel, mesh: ParallelMesh, engine: SequenceParallel, runtime: Runtime
) -> Built:
    """Divide a model, in place, and give it its optimizer.

    Args:
        config: a resolved run.
        model: whole and alike on every process; or without memory (meta), and then it gets its initial values part by part.
        mesh: the processes.
        engine: that will run it.
        runtime: this process.

    Raises:
        UserError: the model does not divide so, or something cannot serve it.
    """
    ledger, empty = engine.ledger, next(model.parameters()).is_meta
    if not empty:
        model.to(runtime.device)
    if config.train.precision == "fp8":
        check_fp8(runtime.device)
        convert_to_fp8(model)
    if config.train.compile:
        check_compiler(runtime.device)
        compile_token_local(model)
    model.activation_checkpointing = config.train.activation_checkpointing
    model.activation_offload = config.train.activation_offload
    engine.check(*model.needs())
    if model.needs()[0]:
        engine.prepare(runtime.device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    flops_per_token = model.flops_per_token(config.data.seq_length)
    undecayed = undecayed_names(model)
    pipeline = _pipeline(config, model, Comm(mesh.pipeline_group, ledger), runtime)
    tensor = TensorParallel(model, Comm(mesh.tensor_group, ledger))
    experts = ExpertParallel(model, *(Comm(group, ledger) for group in (mesh.expert_group, mesh.expert_copies_group)))
    cuts = tensor.kept, experts.kept
    fill = Initialiser(model, lambda name: [cut[name] for cut in cuts if name in cut], runtime.device, config.train.seed)
    parallel: DataParallel
    if config.parallel.data_parallel_backend == "deepspeed":
        os.environ.setdefault("LOCAL_RANK", str(runtime.local_rank))  # DeepSpeed asks for it, however processes are started
        fill(model)
        parallel = ZeroParallel(model, mesh, config.parallel.zero_stage, config.parallel.zero_offload, ledger=ledger)
    else:
        parallel = DataParallel(
            model,
            mesh,
            config.parallel.data_parallel_backend,
            blocks=tuple(model.layers),
            parameter_dtype=torch.bfloat16 if config.parallel.parameter_dtype == "bf16" else None,
            ledger=ledger,
            tensor=tensor,
            experts=experts,
            pipeline=pipeline,
            fill=fill,
        )
    optimizer = make_optimizer(model, config.optimizer, undecayed)
    parallel.drive(optimizer)
    return Built(parallel, optimizer, pipeline, parameters, flops_per_token)


def _pipeline(config: TrainConfig, model: LanguageModel, comm: Comm, runtime: Runtime) -> PipelineParallel | None:
    """The model narrowed to the layers of this process, if processes divide them."""
    parallel = config.parallel
    if parallel.pipeline_parallel_size == 1:
        return None
    each = stages_per_rank(config)
    how = parallel.pipeline_schedule, each, parallel.pipeline_split, config.data.seq_length
    costs = measured_costs(config, model, runtime) if parallel.pipeline_costs == "measured" else None
    return PipelineParallel(model, comm, *how, costs=costs)
