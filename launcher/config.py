"""What a run is: one frozen dataclass per concern, a YAML file's keys and the command line's flags alike."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from longhaul.launcher.data import DataConfig
from longhaul.launcher.metrics import MetricsConfig
from longhaul.launcher.planned.config import PlannerConfig, check_planner
from longhaul.models.config import ModelConfig
from longhaul.models.errors import UserError
from longhaul.models.ops.recompute import MODES as CHECKPOINTING
from longhaul.parallel.data import BACKENDS
from longhaul.parallel.mesh import Degrees
from longhaul.parallel.pipeline.stages import SCHEDULES as PIPELINE_SCHEDULES

from .engines import check_engines

SCHEMA_VERSION = 1

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "wsd", "constant")
PRECISIONS = ("fp32", "bf16")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name} is {value!r}: give {', '.join(choices[:-1])} or {choices[-1]}.")


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:  # true for NaN
        raise UserError(f"{name} is {value}: give {least} or more.")


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
    """Layers of each stage of a pipeline, [4,4,4,3]; cut by the layers' FLOPs and the head's if left out."""

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
        _one_of("parallel.pipeline_schedule", self.pipeline_schedule, tuple(PIPELINE_SCHEDULES))
        _one_of("parallel.data_parallel_backend", self.data_parallel_backend, BACKENDS)
        _one_of("parallel.parameter_dtype", self.parameter_dtype, PRECISIONS)
        _one_of("parallel.exchange_payload", self.exchange_payload, PRECISIONS)
        if self.auto_local_time is not None:
            _at_least("parallel.auto_local_time", self.auto_local_time, 0)
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


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How gradients become weights."""

    name: str = "adamw"
    """`adamw` or `sgd` (plain: no momentum)."""

    lr: float = 1e-3
    """Learning rate after the warm-up."""

    min_lr: float = 1e-4
    """Learning rate at the end of the decay."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averaging of gradients and of their squares."""

    eps: float = 1e-8
    """AdamW's guard against division by zero."""

    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms, biases, A_log, dt_bias and D never decay."""

    clip: float = 1.0
    """Gradients are scaled so that their global norm is at most this; 0 never scales."""

    schedule: str = "cosine"
    """`cosine` from lr to min_lr; `wsd`: warm-up, stable, linear decay at the end; `constant`."""

    warmup_steps: int = 20
    """Steps in which the learning rate rises linearly."""

    decay_steps: int | None = None
    """Length of the decay: cosine: all steps after the warm-up; wsd: the last fifth of the steps, if left out."""

    def __post_init__(self) -> None:
        _one_of("optimizer.name", self.name, OPTIMIZERS)
        _one_of("optimizer.schedule", self.schedule, SCHEDULES)
        for name in ("lr", "min_lr", "eps", "weight_decay", "clip", "warmup_steps"):
            _at_least(f"optimizer.{name}", getattr(self, name), 0)
        if self.decay_steps is not None:
            _at_least("optimizer.decay_steps", self.decay_steps, 1)
        if self.schedule != "constant" and self.min_lr > self.lr:
            raise UserError(
                f"optimizer.min_lr {self.min_lr:g} is above optimizer.lr {self.lr:g}: the rate decays from lr to min_lr."
            )
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise UserError(f"optimizer.betas holds {beta}: give two numbers, at least 0 and below 1.")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, how much at once, and in which precision."""

    steps: int = 200
    """Optimizer steps."""

    global_batch_size: int | None = None
    """Streams in one step over all processes; one for each data-parallel group if left out."""

    micro_batch_size: int = 1
    """Streams in one forward. Always 1: a stream is already a pack of documents, and data.seq_length makes it longer."""

    seed: int = 1
    """Seed of the initial weights."""

    precision: str = "fp32"
    """`fp32`; `bf16`: products in bfloat16 by autocast, weights and sums in float32; `fp8`: as bf16, and wide linear layers
    multiply in 8-bit floats, on GPUs that can and with torchao."""

    compile: bool = False
    """Compile feed-forward layers and norms with torch.compile, at the first step; needs a C++ compiler (CPU) or triton (GPU)."""

    activation_checkpointing: str = "none"
    """`none` keeps activations; `full` recomputes each layer in the backward, and sends nothing again; `selective` keeps
    the results of scans, attentions and products with weights, and recomputes the rest (docs/memory.md)."""

    activation_offload: bool = False
    """What is kept for the backward waits in the host's memory, on a GPU."""

    stream_tokens: int | None = None
    """Run each stream in chunks of so many tokens and keep only the states at their borders: for streams longer than memory,
    with the gradients of the whole (docs/streaming.md); whole if left out."""

    stream_truncated: bool = False
    """With stream_tokens: hand states on without gradients and run each chunk once, cheaper and not exact: truncated
    backpropagation through time."""

    eval_every: int = 0
    """Steps between evaluations on held-out documents; 0 evaluates after the last step only."""

    deterministic: bool = False
    """Only algorithms that give the same bits in every run; some are slower on GPUs."""

    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: cuda where there is a GPU."""

    timeout: float = 300.0
    """Seconds a process waits for another before the run fails."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("seed", 0), ("eval_every", 0)):
            _at_least(f"train.{name}", getattr(self, name), least)
        if not self.timeout > 0:
            raise UserError(f"train.timeout is {self.timeout}: give a number of seconds above 0.")
        if self.micro_batch_size != 1:
            raise UserError(
                f"train.micro_batch_size is {self.micro_batch_size}: only 1 is possible, because a stream has no batch "
                "axis; raise data.seq_length for more tokens at once, or train.global_batch_size for more a step."
            )
        if self.global_batch_size is not None:
            _at_least("train.global_batch_size", self.global_batch_size, 1)
        if self.stream_tokens is not None:
            _at_least("train.stream_tokens", self.stream_tokens, 1)
        if self.stream_truncated and self.stream_tokens is None:
            raise UserError("train.stream_truncated needs train.stream_tokens, a chunk's tokens: give them, or leave it out.")
        _one_of("train.precision", self.precision, (*PRECISIONS, "fp8"))
        if self.compile and self.activation_checkpointing == "selective":
            raise UserError(
                "train.activation_checkpointing selective keeps products with weights, which compiled code does not show: set "
                "it to none or full, or train.compile to false."
            )
        _one_of("train.activation_checkpointing", self.activation_checkpointing, CHECKPOINTING)
        _one_of("train.device", self.device, ("auto", "cpu", "cuda"))


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where results lie, how often they are saved, and where a run goes on."""

    folder: str = "runs/default"
    """The run's folder: checkpoints step_N, LATEST, resolved_config.yaml, metrics and report."""

    every: int = 100
    """Steps between checkpoints; the last step is saved in any case, unless this is 0: then nothing is."""

    keep: int = 2
    """The newest so many checkpoints are kept, older ones deleted; 0 keeps all."""

    resume: str = "auto"
    """`auto` goes on from the folder's newest good checkpoint if there is one; `never` wants a folder without any; else
    the path of a run's folder or of one step_N."""

    background: bool = True
    """Write while training goes on; the state is copied first."""

    def __post_init__(self) -> None:
        _at_least("checkpoint.every", self.every, 0)
        _at_least("checkpoint.keep", self.keep, 0)
        for name in ("folder", "resume"):
            if not getattr(self, name):
                raise UserError(f"checkpoint.{name} is empty: give a value or leave the key out.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run."""

    schema_version: int = SCHEMA_VERSION
    """Version of these keys; a file of another version is refused instead of misread."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""

    data: DataConfig = field(default_factory=DataConfig)
    """Documents and streams."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Processes."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and learning rate."""

    train: TrainingConfig = field(default_factory=TrainingConfig)
    """Length and precision."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving and resuming."""

    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """What is shown and recorded."""

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise UserError(
                f"schema_version is {self.schema_version}, but this version of Longhaul reads {SCHEMA_VERSION}: see "
                "CHANGELOG.md for what changed, mend the file and set schema_version."
            )
        if self.metrics.horizon_every and self.parallel.pipeline_parallel_size > 1:
            raise UserError(
                f"metrics.horizon_every {self.metrics.horizon_every} runs the whole model on one process's layers, but "
                f"parallel.pipeline_parallel_size is {self.parallel.pipeline_parallel_size}: leave one of the two out."
            )
        if self.model.prefix_length and self.data.prefix_length != self.model.prefix_length:
            raise UserError(
                f"model.linear_mixer {self.model.linear_mixer} reads a prefix of {self.model.prefix_length} tokens both ways, so "
                f"that asking for the next token inside it asks for what is seen, but data.prefix_length is "
                f"{self.data.prefix_length}: set it to {self.model.prefix_length}."
            )

    @property
    def streams_per_group(self) -> int:
        """Streams of a step for each data-parallel group; of a resolved run."""
        assert self.train.global_batch_size is not None and self.parallel.data_parallel_size is not None, "resolved"
        return self.train.global_batch_size // self.parallel.data_parallel_size

    def resolve(self, world_size: int) -> TrainConfig:
        """Every derived number filled in for `world_size` processes; UserError if something does not fit together."""
        degrees = self.parallel.degrees(world_size)
        batch = self.train.global_batch_size or degrees.data
        planned = self.parallel.planner.enabled
        if planned and self.train.stream_truncated:
            raise UserError("train.stream_truncated cannot be used with parallel.planner, which streams exactly: leave one out.")
        if planned and self.data.carry_state:
            raise UserError(
                "data.carry_state needs a stream's documents in order, but parallel.planner runs them as they fit best: leave "
                "one of the two out."
            )
        if batch % degrees.data and not planned:
            raise UserError(
                f"train.global_batch_size {batch} is not a multiple of the {degrees.data} data-parallel groups: give a "
                f"multiple of {degrees.data}."
            )
        if self.data.carry_state and degrees.data > 1:
            raise UserError(
                f"data.carry_state needs data_parallel_size 1, not {degrees.data}: a stream goes on in the next one, "
                "which another group reads at the same time; use parallel.sequence_parallel_size instead."
            )
        if degrees.expert > 1 and self.model.ffn != "moe":
            raise UserError(
                f"parallel.expert_parallel_size {degrees.expert} needs experts, but model.ffn is {self.model.ffn}: set "
                "it to moe, or leave parallel.expert_parallel_size at 1."
            )
        if self.data.carry_state and degrees.tensor > 1:
            raise UserError(
                f"data.carry_state needs tensor_parallel_size 1, not {degrees.tensor}: the states of a process's heads alone "
                "could not be resumed elsewhere; use parallel.sequence_parallel_size instead."
            )
        return replace(
            self,
            parallel=replace(self.parallel, data_parallel_size=degrees.data),
            train=replace(self.train, global_batch_size=batch),
        )
