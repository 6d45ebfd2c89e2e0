"""DeepSpeed's ZeRO as a data-parallel backend (Rajbhandari et al., arXiv 1910.02054; offload, arXiv 2101.06840).

    stage 1    the optimizer's states are sharded over all processes
    stage 2    gradients, too
    stage 3    parameters, too
    offload    the optimizer's states and its arithmetic are on the CPU; of stage 3 the parameters' shards, too

DeepSpeed divides summed gradients by the number of its processes (and multiplies by the size of its own sequence groups, of
which it is told nothing here). Ours are sums: the loss's gradient is multiplied by that number as it enters the backward.

The engine is made at the first forward with gradients, from whatever weights and optimizer states there are by then. So a run
is resumed before that, as without DeepSpeed, and a checkpoint is the ordinary one: tensors are gathered one by one, each process
keeps some, and any topology and backend reads them.

What DeepSpeed sends is not in the ledger.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longhaul.models.errors import UserError

from .comm import Ledger
from .data import DataParallel
from .mesh import ParallelMesh

BUCKET = 50_000_000  # numbers in one message at most; DeepSpeed's own choice is ten times that, 2 GB in float32


def _deepspeed() -> Any:
    """The package; UserError if it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, which it compiles with
            import deepspeed
            import deepspeed.ops
    except ImportError as error:
        raise UserError(
            f"parallel.data_parallel_backend deepspeed needs DeepSpeed, which cannot be imported ({error}): install it with "
            "pip install 'longhaul[deepspeed]', or use fsdp."
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls collectives by names that torch 2.13 changed.
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    # Its shared-memory collectives are compiled at first use, for minutes; a run killed meanwhile leaves a lock behind for
    # which all later ones wait. torch.distributed's do as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class _Multiply(torch.autograd.Function):
    """The value as it is, its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class _Inside(nn.Module):
    """The model, run under the caller's autocast: DeepSpeed switches it off around its module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, autocast: torch.dtype | None, *args: Any, **kwargs: Any) -> Any:
        device = next(arg for arg in args if isinstance(arg, Tensor)).device.type
        with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
            return self.model(*args, **kwargs)


class ZeroParallel(DataParallel):
    """A model whose states DeepSpeed shards over data x sequence processes.

    Args:
        model: the model, whole and alike on every process.
        mesh: the processes, divided along data and sequence only.
        stage: 1, 2 or 3.
        offload: optimizer (and, in stage 3, parameters) on the CPU.
        ledger: where traffic other than DeepSpeed's is counted.
    """

    def __init__(
        self, model: nn.Module, mesh: ParallelMesh, stage: int = 1, offload: bool = False, ledger: Ledger | None = None
    ) -> None:
        super().__init__(model, mesh, "deepspeed", ledger=ledger)
        assert mesh.degrees.tensor == mesh.degrees.pipeline == 1, "every process holds the same parameters"
        _deepspeed()
        self.stage, self.offload = stage, offload
        self._engine: Any = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    @property
    def counts_outputs(self) -> bool:
        return self.stage == 3  # its hooks make a list, one entry an output, that processes compare

    @property
    def lockstep(self) -> bool:
        return self.stage > 1

    def drive(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._engine is None and not torch.is_grad_enabled():
            return self.model(*args, **kwargs)  # a look at the model, maybe before its weights are restored
        if self._engine is None:
            self._start()
        device = next(arg for arg in args if isinstance(arg, Tensor)).device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        output = self._engine(autocast, *args, **kwargs)
        if torch.is_grad_enabled() and hasattr(output, "loss_sum"):
            output = output._replace(loss_sum=_Multiply.apply(output.loss_sum, float(self._engine.dp_world_size)))
        return output

    def _start(self) -> None:
        assert self._optimizer is not None, "drive() comes before the first forward"
        if not dist.is_initialized():  # DeepSpeed wants a group, be it of one process
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
        deepspeed = _deepspeed()
        device = next(self.model.parameters()).device.type
        found = deepspeed.accelerator.get_accelerator().device_name()
        if found != device:
            raise UserError(
                f"train.device is {device}, but DeepSpeed works on {found}: set DS_ACCELERATOR={device} in the environment."
            )
        deepspeed.init_distributed(dist_init_required=False)
        states = {name: self._optimizer.state.pop(p) for name, p in self._trained if p in self._optimizer.state}
        where = {"device": "cpu", "pin_memory": device == "cuda"} if self.offload else {"device": "none"}
        whole = sum(p.numel() for _, p in self._trained)
        bucket = min(BUCKET, whole + whole % 2)  # buffers are this large, whatever the model; DeepSpeed wants it even
        zero = {
            "stage": self.stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": False,  # and with it reductions into a buffer that a second micro-batch overwrites
            "offload_optimizer": where,
            **({"offload_param": where} if self.stage == 3 else {}),
        }
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,  # a step ends where `step` is called
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
        }
        self._engine, *_ = deepspeed.initialize(
            model=_Inside(self.model), optimizer=self._optimizer, config=settings, dist_init_required=False
        )
        self._take(states)

    def step(self, optimizer: torch.optim.Optimizer, clip: float) -> Tensor:
        zero = self._engine.optimizer
        zero.clip_grad = clip
        self._engine.step()
        return torch.as_tensor(zero._global_grad_norm, dtype=torch.float64)

    def finish_gradients(self) -> None:
        pass  # DeepSpeed sums

    def gathered(self, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """See `DataParallel.gathered`: the share of the tensors that this process writes."""
        if self._engine is None:
            return super().gathered(optimizer)
        from deepspeed.utils import safe_get_full_fp32_param

        world, rank = dist.get_world_size(), dist.get_rank()
        values: dict[str, Tensor] = {}
        states: dict[nn.Parameter, dict[str, Tensor]] = {}
        for index, (name, parameter) in enumerate(self._trained):
            value = safe_get_full_fp32_param(parameter)
            state = dict(self._gathered_states(parameter))
            if index % world == rank:
                values[name] = value.cpu()
                states[parameter] = {key: tensor.cpu() for key, tensor in state.items()}
        trained = {name for name, _ in self._trained}
        parameters = {id(p): name for name, p in self._trained}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            twin = parameters.get(id(tensor), name)  # a shared parameter under its other names
            if twin in values:
                values[name] = values[twin]
            elif twin not in trained and rank == 0:
                values[name] = tensor.detach()
        named = [(name, p) for name, p in self._trained if name in values]
        return (
            SimpleNamespace(state_dict=lambda: values, named_parameters=lambda: named),
            SimpleNamespace(state=states),
        )

    def flat(self, parameter: Any) -> tuple[Tensor, int, int, int] | None:
        """Where this process holds a part of a parameter: the flat tensor that the optimizer steps, the part's offset there
        and its length, and where in the parameter it begins. None if it holds none."""
        zero = self._engine.optimizer
        if self.stage == 3:
            group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
            start = length * dist.get_rank()
            return zero.fp32_partitioned_groups_flat[group], offset, max(0, min(length, parameter.ds_numel - start)), start
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return zero.single_partition_of_fp32_groups[mapping.param_group_index], here.start, here.numel, there.start

    def _gathered_states(self, parameter: Any) -> Iterator[tuple[str, Tensor]]:
        """The optimizer's state of a parameter, whole; every process takes part."""
        shape = parameter.ds_shape if self.stage == 3 else parameter.shape
        place = self.flat(parameter)
        assert self._optimizer is not None
        any_flat = next(iter(self._optimizer.state), None)
        if any_flat is None:  # plain SGD has none
            return
        for key, example in self._optimizer.state[any_flat].items():
            if example.shape != any_flat.shape:  # a count of steps
                yield key, example.detach().clone()
                continue
            whole = torch.zeros(shape, dtype=torch.float32, device=parameter.device).flatten()
            if place is not None:
                flat, offset, length, start = place
                whole[start : start + length] = self._optimizer.state[flat][key][offset : offset + length].to(whole.device)
            dist.all_reduce(whole)
            yield key, whole.view(shape)

    def _take(self, states: dict[str, dict[str, Tensor]]) -> None:
        """Give DeepSpeed's flat tensors the optimizer states that the run was resumed with."""
        assert self._optimizer is not None
        for name, parameter in self._trained:
            place = self.flat(parameter) if name in states else None
            if place is None:
                continue
            flat, offset, length, start = place
            held = self._optimizer.state[flat]
            for key, value in states[name].items():
                if not value.ndim:
                    held[key] = value.clone()
                    continue
                if key not in held:
                    held[key] = torch.zeros_like(flat)
                held[key][offset : offset + length] = value.detach().flatten()[start : start + length].to(flat.device)
