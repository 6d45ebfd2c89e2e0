"""The job: a GPTModel of our mixers under Megatron's schedules, DDP and optimizers, in every division of it.

It is a process of its own, because the stand-in for `torch.cuda` never goes away. It imports Megatron once and forks the ranks.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tests.parallel.megatron_model import LENGTH, ROWS, VOCABULARY, gpt_model, parts, transformer_config

MICRO_BATCHES = 2
MIXERS = ("mamba2", "attention", "gated_deltanet", "gla")  # the last two have parameters that all heads share


class Case(NamedTuple):
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False
    recompute: bool = False
    adam: bool = False  # Megatron's distributed optimizer, which knows no other; else plain SGD

    @property
    def world_size(self) -> int:
        return self.tensor * self.context * self.pipeline

    @property
    def reference(self) -> str:
        return "one adam" if self.adam else "one"


CASES = {
    "one": Case(),
    "one adam": Case(adam=True),
    "cp2": Case(context=2),
    "tp2": Case(tensor=2),
    "tp2 sp": Case(tensor=2, sequence_parallel=True),
    "pp2": Case(pipeline=2),
    "cp2 adam": Case(context=2, adam=True),
    "tp2 cp2": Case(tensor=2, context=2),
    "tp2 cp2 sp": Case(tensor=2, context=2, sequence_parallel=True),
    "tp2 cp2 sp recompute": Case(tensor=2, context=2, sequence_parallel=True, recompute=True),
    "cp2 pp2": Case(context=2, pipeline=2),
    "tp2 pp2 sp": Case(tensor=2, pipeline=2, sequence_parallel=True),
}


def _model(case: Case) -> Any:
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    config = transformer_config(
        MIXERS,
        case.tensor,
        case.context,
        case.sequence_parallel,
        pipeline_model_parallel_size=case.pipeline,
        pipeline_dtype=torch.float32,
        calculate_per_token_loss=True,
        **(recompute if case.recompute else {}),
    )
    config.finalize_model_grads_func = finalize_model_grads
    stage = parallel_state.get_pipeline_model_parallel_rank()
    model = gpt_model(config, MIXERS, "zigzag", stage=stage, stages=case.pipeline)
    return DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=case.adam), model)


def _batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(MICRO_BATCHES):
        tokens, labels = torch.randint(VOCABULARY, (2, ROWS, LENGTH), generator=generator)
        mask = (torch.rand(ROWS, LENGTH, generator=generator) < 0.8).float()
        places = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)
        batches.append({"tokens": tokens, "labels": labels, "loss_mask": mask, "places": places})
    return batches


def run(case: Case) -> dict[str, Any]:
    """One step: losses of the tokens held here with their places, gradients, and parameters after it, each with its `Part`."""
    from megatron.core import parallel_state
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.utils import get_batch_on_this_cp_rank

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=case.tensor,
        context_parallel_size=case.context,
        pipeline_model_parallel_size=case.pipeline,
    )
    try:
        model_parallel_cuda_manual_seed(1)
        model = _model(case)
        options = OptimizerConfig(
            optimizer="adam" if case.adam else "sgd",
            lr=0.5,
            weight_decay=0.0,
            sgd_momentum=0.0,
            adam_eps=1.0,  # so large that a step grows with the gradient, and a wrong factor shows
            clip_grad=1e9,
            use_distributed_optimizer=case.adam,
        )
        optimizer = get_megatron_optimizer(options, [model])
        losses: list[tuple[Tensor, Tensor]] = []

        def forward_step(batches: Any, stage: Any) -> Any:
            batch = get_batch_on_this_cp_rank(next(batches))
            output = stage(batch["tokens"], None, None, labels=batch["labels"])

            def loss(found: Tensor) -> Any:
                losses.append((batch["places"].flatten(), found.detach().flatten()))
                weighted = (found * batch["loss_mask"]).sum()
                return weighted, batch["loss_mask"].sum().int(), {"loss": weighted.detach()}

            return output, loss

        model.zero_grad_buffer()
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(_batches()),
            model=[model],
            num_microbatches=MICRO_BATCHES,
            seq_length=LENGTH,
            micro_batch_size=ROWS,
            forward_only=False,
        )
        held = parts(model.module)
        named = [(held[name], parameter) for name, parameter in model.module.named_parameters()]
        # The distributed optimizer sums only the part of the gradients that it steps with.
        gradients = [] if case.adam else [(part, parameter.main_grad.clone()) for part, parameter in named]
        _, norm, _ = optimizer.step()
        parameters = [(part, parameter.detach().clone()) for part, parameter in named]
        return {"losses": losses, "gradients": gradients, "norm": norm, "parameters": parameters}
    finally:
        parallel_state.destroy_model_parallel()


def _rank(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store{world_size}"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    for name, case in CASES.items():
        if case.world_size == world_size:
            torch.save(run(case), folder / f"{name}.{rank}.pt")
    dist.destroy_process_group()


def main(folder: Path) -> None:
    """Write FOLDER/CASE.RANK.pt of every case."""
    from tests.megatron_cuda import stand_in

    warnings.simplefilter("ignore")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no look-up of the host's name
    stand_in.install()
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.optimizer
    import megatron.core.pipeline_parallel  # noqa: F401

    context = multiprocessing.get_context("fork")
    for world_size in (1, 2, 4):
        ranks = [context.Process(target=_rank, args=(rank, world_size, folder)) for rank in range(world_size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(180)
            if process.exitcode != 0:
                for each in ranks:
                    each.kill()
                sys.exit(f"a rank of {world_size} ended with {process.exitcode}")
