"""How processes share the work: the keys below `parallel`."""

from __future__ import annotations

from dataclasses import dataclass, field

from longhaul.models.errors import UserError
from longhaul.parallel.data import BACKENDS
from longhaul.parallel.mesh import Degrees
from longhaul.parallel.pipeline.stages import SCHEDULES as PIPELINE_SCHEDULES

from .checks import at_least, one_of
from .engines import check_engines
from .planned.config import PlannerConfig, check_planner

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How processes share the work; the product of the degrees is the number of processes."""

    data_parallel_size: int | None = None
    """Groups of processes that read different streams; what the other degrees leave over if left out."""

    tensor_parallel_size: int = 1
    """Processes that share the heads of each layer and the vocabulary; neighbours, best inside a machine."""

    pipeline_parallel_size: int = 1
    """Processes that share the layers."""

    pipeline_schedule: str = "1f1b"
    """In which order a pipeline runs the streams of a step, each a micro-batch: gpipe, 1f1b; with several stages a process
    interleaved_1f1b, looped_bfs, interleaved_zero_bubble, zbv_zero_bubble or dualpipev."""

    pipeline_stages_per_rank: int | None = None
    """Stages of layers on each process of a pipeline; 2 where the schedule allows several, if left out."""

    pipeline_split: tuple[int, ...] | None = None
    """Layers of each stage of a pipeline, [4,4,4,3]; cut by pipeline_costs if left out."""

    pipeline_costs: str = "predicted"
    """What a pipeline's stages are cut by: predicted, the FLOPs of layers and head; or measured, a layer of each kind and the
    head timed at the start, at the run's length or a part of it."""

    sequence_parallel_size: int = 1
    """Processes that share the tokens of each stream."""

    sequence_inner_size: int | None = None
    """Neighbours of a sequence that share a node, for engines with two levels (exchange hierarchical, attention usp); the
    most that fit the processes of a machine if left out."""

    expert_parallel_size: int = 1
    """Processes that share the experts of each layer (model.ffn moe): neighbours among those that share streams and tokens."""

    data_parallel_backend: str = "fsdp"
    """`fsdp` shards parameters, gradients and optimizer over all processes; `ddp` keeps them whole on each; `deepspeed` is
    DeepSpeed's ZeRO, in the stage that zero_stage says."""

    data_parallel_replicate_size: int = 1
    """Copies that fsdp keeps of the sharded parameters (HSDP): with 4 on 32 processes each parameter is spread over 8
    neighbours, inside a machine, and only gradients travel between copies."""

    zero_stage: int = 1
    """What data_parallel_backend deepspeed shards over all processes: 1 the optimizer's states, 2 gradients too, 3 parameters
    too."""

    zero_offload: bool = False
    """ZeRO keeps the optimizer on the CPU and steps there; of stage 3 the parameters, too."""

    parameter_dtype: str = "fp32"
    """In which type fsdp gathers parameters: fp32 or bf16. Gradients are summed in fp32 in any case."""

    exchange: str = "all_gather"
    """How recurrent states travel between processes of a sequence: all_gather (LASP-2), ring (LASP), all_scan (ZeCO),
    log_scan, hierarchical, or auto, which measures and picks."""

    attention: str = "all_gather"
    """How softmax attention reaches keys and values of other processes: all_gather, ring, ulysses, usp or rsa."""

    layout: str = "contiguous"
    """How the tokens of a stream are spread over the processes of a sequence: contiguous, zigzag, striped,
    contiguous_per_document or zigzag_per_document."""

    exchange_payload: str = "fp32"
    """In which type summaries of tokens travel: fp32; or bf16, folded in fp32, for half the bytes with exchange all_gather (the
    others pass a running state on, which each process would round)."""

    exchange_blocks: int | None = None
    """Blocks in which exchange all_scan cuts a state, at most as many as it has values; from its size if left out."""

    exchange_inside: str | None = None
    """What exchange hierarchical runs inside a node: all_gather (if left out) or log_scan."""

    exchange_across: str | None = None
    """What exchange hierarchical runs across nodes: any other exchange; all_scan if left out."""

    auto_latency: float | None = None
    """Seconds that exchange auto takes a message to need, with auto_bandwidth; both measured at the start if left out."""

    auto_bandwidth: float | None = None
    """Bytes a second that exchange auto takes a link to carry, with auto_latency."""

    auto_local_time: float | None = None
    """Seconds of work on a token that exchange auto takes to hide messages; measured if left out. With it and the two
    before, two runs choose alike."""

    reach_tolerance: float | None = None
    """Off if left out. Where constant decays leave at most this share of a state after a part of the stream, the part does not
    pass it on; the proven bound on the error is reported (docs/engines.md). Not with exchange all_gather."""

    attention_head_slices: int | None = None
    """Slices of heads that attention all_gather gathers one after the other: memory for gathered keys and values shrinks by
    it, messages grow by it; one if left out."""

    attention_backward: str = "auto"
    """What attention ring moves in its backward: kv, q, or auto for whichever is fewer bytes."""

    layout_stripe: int | None = None
    """Tokens of a stripe of layout striped; a sixteenth of a process's share if left out."""

    layout_shares: tuple[float, ...] | None = None
    """Shares of layout contiguous, one a process of a sequence, in any unit: [2,1] gives the first process twice the tokens
    of the second; equal if left out."""

    planner: PlannerConfig = field(default_factory=PlannerConfig)
    """A plan for each step, instead of one sequence-parallel size for all."""

    def __post_init__(self) -> None:
        check_planner(self)
        if self.expert_parallel_size != 1 and self.pipeline_parallel_size != 1:
            raise UserError(
                f"parallel.expert_parallel_size {self.expert_parallel_size} does not work with parallel.pipeline_parallel_size "
                f"{self.pipeline_parallel_size} yet: leave one of the two at 1."
            )
        one_of("parallel.pipeline_schedule", self.pipeline_schedule, tuple(PIPELINE_SCHEDULES))
        one_of("parallel.pipeline_costs", self.pipeline_costs, ("predicted", "measured"))
        if self.pipeline_costs == "measured" and self.pipeline_split is not None:
            raise UserError(
                f"parallel.pipeline_costs measured has no use beside parallel.pipeline_split {list(self.pipeline_split)}: leave "
                "one of the two out."
            )
        one_of("parallel.data_parallel_backend", self.data_parallel_backend, BACKENDS)
        one_of("parallel.parameter_dtype", self.parameter_dtype, PRECISIONS)
        one_of("parallel.exchange_payload", self.exchange_payload, PRECISIONS)
        if self.auto_local_time is not None:
            at_least("parallel.auto_local_time", self.auto_local_time, 0)
        check_engines(self)
        if self.zero_stage not in (1, 2, 3):
            raise UserError(f"parallel.zero_stage is {self.zero_stage}: give 1, 2 or 3.")
        if self.data_parallel_backend != "deepspeed" and (self.zero_stage != 1 or self.zero_offload):
            raise UserError(
                f"parallel.zero_stage {self.zero_stage} and zero_offload {str(self.zero_offload).lower()} need "
                f"parallel.data_parallel_backend deepspeed, not {self.data_parallel_backend}: leave them out."
            )
        for name in ("tensor", "pipeline", "expert"):
            size = getattr(self, f"{name}_parallel_size")
            if self.data_parallel_backend == "deepspeed" and size != 1:
                raise UserError(
                    f"parallel.data_parallel_backend deepspeed works with parallel.{name}_parallel_size 1, not {size}: ZeRO "
                    "takes every process to hold the same parameters; use fsdp."
                )
        if self.data_parallel_replicate_size != 1 and self.data_parallel_backend != "fsdp":
            raise UserError(
                f"parallel.data_parallel_replicate_size {self.data_parallel_replicate_size} needs "
                f"parallel.data_parallel_backend fsdp, not {self.data_parallel_backend}: leave it out."
            )
        if self.parameter_dtype != "fp32" and self.data_parallel_backend != "fsdp":
            raise UserError(
                f"parallel.parameter_dtype {self.parameter_dtype} needs parallel.data_parallel_backend fsdp, not "
                f"{self.data_parallel_backend}; for bf16 products under ddp set train.precision to bf16."
            )

    def degrees(self, world_size: int) -> Degrees:
        """The mesh's shape; UserError if the degrees do not make `world_size` processes."""
        return Degrees.resolve(
            world_size,
            data=self.data_parallel_size,
            pipeline=self.pipeline_parallel_size,
            sequence=self.sequence_parallel_size,
            tensor=self.tensor_parallel_size,
            replicate=self.data_parallel_replicate_size,
            expert=self.expert_parallel_size,
        )
