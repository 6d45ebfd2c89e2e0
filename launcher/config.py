"""What a run is: one frozen dataclass per concern, a YAML file's keys and the command line's flags alike."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from longhaul.launcher.data import DataConfig
from longhaul.launcher.metrics import MetricsConfig
from longhaul.models.config import ModelConfig
from longhaul.models.errors import UserError
from longhaul.models.ops.recompute import MODES as CHECKPOINTING

from .checks import at_least, one_of
from .parallel_config import PRECISIONS
from .parallel_config import ParallelConfig as ParallelConfig

SCHEMA_VERSION = 1

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "wsd", "constant")


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
        one_of("optimizer.name", self.name, OPTIMIZERS)
        one_of("optimizer.schedule", self.schedule, SCHEDULES)
        for name in ("lr", "min_lr", "eps", "weight_decay", "clip", "warmup_steps"):
            at_least(f"optimizer.{name}", getattr(self, name), 0)
        if self.decay_steps is not None:
            at_least("optimizer.decay_steps", self.decay_steps, 1)
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
            at_least(f"train.{name}", getattr(self, name), least)
        if not self.timeout > 0:
            raise UserError(f"train.timeout is {self.timeout}: give a number of seconds above 0.")
        if self.micro_batch_size != 1:
            raise UserError(
                f"train.micro_batch_size is {self.micro_batch_size}: only 1 is possible, because a stream has no batch "
                "axis; raise data.seq_length for more tokens at once, or train.global_batch_size for more a step."
            )
        if self.global_batch_size is not None:
            at_least("train.global_batch_size", self.global_batch_size, 1)
        if self.stream_tokens is not None:
            at_least("train.stream_tokens", self.stream_tokens, 1)
        if self.stream_truncated and self.stream_tokens is None:
            raise UserError("train.stream_truncated needs train.stream_tokens, a chunk's tokens: give them, or leave it out.")
        one_of("train.precision", self.precision, (*PRECISIONS, "fp8"))
        if self.compile and self.activation_checkpointing == "selective":
            raise UserError(
                "train.activation_checkpointing selective keeps products with weights, which compiled code does not show: set "
                "it to none or full, or train.compile to false."
            )
        one_of("train.activation_checkpointing", self.activation_checkpointing, CHECKPOINTING)
        one_of("train.device", self.device, ("auto", "cpu", "cuda"))


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
        at_least("checkpoint.every", self.every, 0)
        at_least("checkpoint.keep", self.keep, 0)
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
