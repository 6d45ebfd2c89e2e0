"""From a run's parts to its planned stepper."""

from __future__ import annotations

from typing import Any

import torch

from longhaul.launcher.batches import stream_indices
from longhaul.launcher.config import TrainConfig
from longhaul.launcher.data import Data
from longhaul.launcher.engines import engine_arguments
from longhaul.models.lm import LanguageModel
from longhaul.parallel.comm import Comm
from longhaul.parallel.data import DataParallel
from longhaul.parallel.engine import SequenceParallel
from longhaul.parallel.executor import Executor
from longhaul.parallel.mesh import ParallelMesh
from longhaul.parallel.runtime import Runtime

from .ahead import StepPlanner
from .inputs import check_lengths, planner_inputs
from .stepper import PlannedStepper


def planned_stepper(
    config: TrainConfig,
    data: Data,
    model: DataParallel,
    mesh: ParallelMesh,
    engine: SequenceParallel,
    runtime: Runtime,
    optimizer: torch.optim.Optimizer,
    options: dict[str, Any],
) -> PlannedStepper | None:
    """None unless `parallel.planner.enabled`.

    Args:
        engine: of this rank alone: every place is a sequence group of its own until a plan says otherwise.
        options: of `Stepper`.

    Raises:
        UserError: memory is not known, a document fits nowhere, or an engine cannot serve the model.
    """
    if not config.parallel.planner.enabled:
        return None
    whole = model.model
    assert isinstance(whole, LanguageModel)
    places = Comm(mesh.data_group, engine.ledger)
    cluster, costs = planner_inputs(config, places, runtime)
    longest = max(int(corpus.lengths.max()) for corpus in (data.train_corpus, data.held_out_corpus) if corpus is not None)
    longest = min(longest + config.data.repeat_context, config.data.seq_length)
    check_lengths(longest, cluster, costs, config.train.stream_tokens)
    executor = Executor(
        mesh,
        lambda comm: SequenceParallel(comm, **engine_arguments(config.parallel), tensor=engine.tensor),
        device=runtime.device,
        ledger=engine.ledger,
    )
    executor.check(*whole.needs())
    batch = config.train.global_batch_size
    assert batch is not None, "resolved"
    planner = StepPlanner(
        lambda first: [data.train.stream(index) for index in stream_indices(first, batch, 0, 1)],
        batch,
        cluster,
        costs,
        config.parallel.planner,
        pod_ranks=0 if model.lockstep else None,  # pods must not wait for each other
    )
    return PlannedStepper(model, engine, runtime, optimizer, planner=planner, executor=executor, **options)
