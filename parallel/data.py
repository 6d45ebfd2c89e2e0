"""Data parallelism: parameters that are alike on many processes, and gradients that are summed over them.

The objective is the sum over processes of their local losses, each already divided by the global count of valid tokens.
So gradients are *summed* and nowhere divided again: FSDP2's and DDP's own averages are switched off.

Letters: `P` processes of the gradient group.
"""

# No `from __future__ import annotations`: DDP reads the annotations of its hook and wants types, not strings.

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from longhaul.models.heads import Kept

from .comm import Comm, Ledger
from .expert import ExpertParallel
from .mesh import ParallelMesh
from .pipeline.layers import PipelineParallel
from .tensor import TensorParallel

BACKENDS = ("fsdp", "ddp", "deepspeed")
BUCKET = 1 << 23  # elements of gradients in one message

# Renamed in torch 2.13; the old names warn there.
_NEW = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
_WITHOUT_BUFFERS: Any = {"forward_sync_buffers" if _NEW else "broadcast_buffers": False}
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class DataParallel:
    """A model whose gradients are summed over data x sequence processes.

    Args:
        model: the model, whole and alike on every process; fsdp shards it in place.
        mesh: the processes.
        backend: `fsdp` or `ddp`; with one process the model stays as it is. With `mesh.degrees.replicate` copies fsdp
            shards inside each copy only, and sums shards of gradients between copies (HSDP).
        blocks: modules that fsdp gathers one at a time; what is left is gathered with the root.
        parameter_dtype: in which fsdp gathers parameters; their own type if None. Gradients are summed in float32 then.
        ledger: where traffic is counted.
        tensor: what of the model this rank holds, if ranks divide heads.
        experts: which experts it holds, if ranks divide them; they are alike, and summed, over fewer processes.
        pipeline: which layers it holds, if ranks divide layers; gradients then go out once a step (`whole_step`).
        fill: gives a block, or what is left of the model, its initial values, just before they are sharded or sent.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: ParallelMesh,
        backend: str = "fsdp",
        blocks: Sequence[nn.Module] = (),
        parameter_dtype: torch.dtype | None = None,
        ledger: Ledger | None = None,
        tensor: TensorParallel | None = None,
        experts: ExpertParallel | None = None,
        pipeline: PipelineParallel | None = None,
        fill: Callable[[nn.Module], None] = lambda module: None,
    ) -> None:
        assert backend in BACKENDS, backend
        ledger = ledger if ledger is not None else Ledger()
        self.model = model
        """The model itself: its names are those of checkpoints."""
        self._forward: Any = model
        self.tensor = tensor or TensorParallel(cast(Any, model), Comm(None, ledger))
        self.experts = experts or ExpertParallel(cast(Any, model), Comm(None, ledger), Comm(None, ledger))
        self.pipeline = pipeline
        self.dtype = parameter_dtype or next(model.parameters()).dtype
        """In which parameters are computed with."""
        self._sharded = False
        self._gradient_comm = Comm(mesh.gradient_group, ledger)
        self._shard_comm = Comm(mesh.shard_group, ledger)
        self._data_comm = Comm(mesh.data_group, ledger)
        if mesh.gradient_mesh is None or backend != "fsdp":
            fill(model)
        if mesh.gradient_mesh is None or backend == "deepspeed":
            return
        if backend == "ddp" and pipeline is not None:
            return  # DDP's hooks do not fire in backwards that are cut in two
        if backend == "ddp":
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(self.experts.kept))
            self._forward = DistributedDataParallel(
                model, process_group=mesh.gradient_group, gradient_as_bucket_view=True, **_WITHOUT_BUFFERS
            )
            self._forward.register_comm_hook(self._gradient_comm, _sum_bucket)
            return
        self._sharded = True
        # States are views, and nobody writes to one: the warning is about writing.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
        policy = MixedPrecisionPolicy(
            param_dtype=parameter_dtype,
            reduce_dtype=None if parameter_dtype is None else torch.float32,
            cast_forward_inputs=False,  # token ids, positions and losses keep their types
        )
        for module in (*blocks, model):
            fill(module)
            for own in self.experts.modules:
                if own in module.modules() and not isinstance(own, FSDPModule):
                    fully_shard(own, mesh=mesh.expert_copies_mesh, mp_policy=policy)
            fully_shard(module, mesh=mesh.shard_mesh, mp_policy=policy)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # A factor of 1 alone would scale inside the reduction (PREMUL_SUM), which gloo does not know.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
                if any(True for _ in module.parameters()):
                    module.set_custom_all_gather(_CountedAllGather(ledger))  # type: ignore[arg-type]
                    module.set_custom_reduce_scatter(_CountedReduceScatter(ledger))  # type: ignore[arg-type]
                    if mesh.replicate_group is not None and module not in self.experts.modules:
                        module.set_all_reduce_hook(partial(_count_all_reduce, Comm(mesh.replicate_group, ledger)))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)

    @property
    def counts_outputs(self) -> bool:
        """Whether the backwards of all processes must start from equally many outputs of every layer."""
        return False

    @property
    def lockstep(self) -> bool:
        """Every forward and backward communicates, so all processes run equally many, those without tokens too."""
        return self._sharded or self.experts.comm.size > 1

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch: only the last one of a step sends gradients."""
        if self._sharded:
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
            yield
        elif isinstance(self._forward, DistributedDataParallel) and not last:
            with self._forward.no_sync():
                yield
        else:
            yield

    @contextmanager
    def whole_step(self) -> Iterator[None]:
        """Around a pipeline's schedule: parameters are gathered once, gradients are sent once, at its end."""
        if not self._sharded:
            yield
            if self._gradient_comm.size > 1:
                self._sum_gradients()
            return
        root: Any = self.model
        root.set_is_last_backward(False)
        root.set_requires_gradient_sync(False)
        root.set_reshard_after_forward(False)
        root.set_reshard_after_backward(False)
        yield
        root.set_is_last_backward(True)
        root.set_requires_gradient_sync(True)
        root.set_reshard_after_forward(True)
        root.set_reshard_after_forward(False, recurse=False)  # fully_shard's own choice
        root.set_reshard_after_backward(True)
        # What the end of a backward does, by hand as in torch's pipeline stages: autograd.grad tells FSDP2 nothing.
        state = fully_shard.state(root)  # type: ignore[attr-defined]
        for module_state in state._state_ctx.all_states:
            for group in module_state._fsdp_param_groups:
                group.post_backward()
        state._root_post_backward_final_callback()

    def _sum_gradients(self) -> None:
        """Sum whole gradients over the gradient group, in messages of some million numbers."""
        bucket: list[Tensor] = []
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for index, parameter in enumerate(parameters):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            if index + 1 == len(parameters) or sum(gradient.numel() for gradient in bucket) >= BUCKET:
                total = self._gradient_comm.all_reduce(torch.cat([gradient.flatten() for gradient in bucket]), "gradients").wait()
                for gradient, summed in zip(bucket, total.split([gradient.numel() for gradient in bucket])):
                    gradient.copy_(summed.view_as(gradient))
                bucket = []

    def sum_over_streams(self, value: float, device: torch.device) -> float:
        """Add a number of this process's streams over all streams of the step; alike in a sequence group."""
        total = self._data_comm.all_reduce(torch.tensor(value, dtype=torch.float64, device=device), "step weight").wait()
        return float(total)

    def cuts(self, name: str) -> tuple[Kept, ...]:
        """How a parameter or buffer of this name was cut before fsdp shards it; for checkpoints."""
        found = (self.tensor.kept.get(name), self.experts.kept.get(name))
        return tuple(kept for kept in found if kept is not None)

    def after_step(self) -> None:
        """What modules noted in a step, summed over its streams, goes back to them: a module may learn otherwise than by
        gradients (`observed() -> Tensor | None`, `after_step(total)`). After the optimizer's step, on every process."""
        for module in self.model.modules():
            noted: Any = module.observed() if hasattr(module, "after_step") else None  # type: ignore[operator]
            if noted is not None:
                module.after_step(self._gradient_comm.all_reduce(noted, "after step").wait())  # type: ignore[operator]

    def finish_gradients(self) -> None:
        """What is left to sum after the backward of a step's last micro-batch; before gradients are read."""
        self.tensor.sum_shared_gradients()
        if not self._sharded:
            self.experts.sum_gradients()
        if self.pipeline is not None:
            self.pipeline.sum_tied_gradients()

    def gradient_norm(self) -> Tensor:
        """The 2-norm of the whole gradient, float64 []: over shards of all processes, each element once."""
        square = torch.zeros((), dtype=torch.float64, device=next(self.model.parameters()).device)
        square_of_experts = square.clone()
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and (self.pipeline is None or self.pipeline.counts(name)):
                own = self.tensor.square_norm(parameter.grad, name)
                if name in self.experts.kept:
                    square_of_experts += own
                else:
                    square += own
        if self.pipeline is not None:
            square = self.pipeline.comm.all_reduce(square, "gradient norm").wait()
        square = self.tensor.comm.all_reduce(square, "gradient norm").wait()
        if self._sharded:
            square = self._shard_comm.all_reduce(square, "gradient norm").wait()  # copies of a shard are alike
        if self.experts.comm.size > 1:
            square_of_experts = self.tensor.comm.all_reduce(square_of_experts, "gradient norm").wait()
            apart = self._gradient_comm if self._sharded else self.experts.comm  # fsdp divides copies too
            square = square + apart.all_reduce(square_of_experts, "gradient norm").wait()
        return square.sqrt()

    def clip_gradients(self, maximum: float) -> Tensor:
        """Scale the gradient so that its norm is at most `maximum` (0: never); returns the norm before, float64 []."""
        norm = self.gradient_norm()
        if maximum > 0:
            scale = (maximum / (norm + 1e-6)).clamp(max=1.0)
            for gradient in self._local_gradients():
                gradient.mul_(scale.to(gradient.dtype))
        return norm

    def drive(self, optimizer: torch.optim.Optimizer) -> None:
        """Be told, before the first forward, which optimizer steps the parameters."""

    def step(self, optimizer: torch.optim.Optimizer, clip: float) -> Tensor:
        """Clip the gradient, step, and forget it; returns its norm before clipping, float64 []."""
        norm = self.clip_gradients(clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def gathered(self, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Model and optimizer as a checkpoint reads them: their `state_dict()`, `named_parameters()` and `state`."""
        return self.model, optimizer

    def _local_gradients(self) -> list[Tensor]:
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        return [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]


def _sum_bucket(comm: Comm, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's reduction, without its division."""
    buffer = bucket.buffer()
    _count_all_reduce(comm, buffer)
    future = dist.all_reduce(buffer, group=comm.group, async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def _count_all_reduce(comm: Comm, buffer: Tensor) -> None:
    size = 2 * (comm.size - 1) * buffer.numel() * buffer.element_size() // comm.size
    comm.ledger.add("gradients", "all_reduce", 2 * (comm.size - 1), size)


class _Buffers:
    """What FSDP2 asks of a custom collective besides the call: memory."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def _count(self, label: str, kind: str, shard: Tensor, group: dist.ProcessGroup) -> None:
        peers = group.size() - 1
        self.ledger.add(label, kind, peers, peers * shard.numel() * shard.element_size())


class _CountedAllGather(_Buffers):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Any:
        self._count("parameters", "all_gather", input_tensor, group)
        return _all_gather(output_tensor, input_tensor, group=group, async_op=async_op)


class _CountedReduceScatter(_Buffers):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> Any:
        self._count("gradients", "reduce_scatter", output_tensor, group)
        if dist.get_backend(group) == "gloo":
            # gloo's own reduce-scatter is an all-reduce, twice the bytes.
            blocks = torch.empty_like(input_tensor)
            dist.all_to_all_single(blocks, input_tensor, group=group)
            torch.sum(blocks.reshape(group.size(), -1), 0, out=output_tensor)
            return None
        return _reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
