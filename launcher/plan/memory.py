"""What one process of a run will hold at its peak, before the run: `longhaul plan memory`.

Parameters, gradients and optimizer states are counted. Activations are measured: a step of stacks of one and of two blocks of
each kind, at two short lengths, with every allocation recorded. A block more costs what it keeps until the backward; what is left
of a stack is what comes and goes. Both grow linearly with the tokens held here, because every op runs in chunks.

Letters: T tokens held here at once, N parameters, P processes that share them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from longhaul.launcher.config import TrainConfig
from longhaul.launcher.metrics.hardware import peak_resident_gib
from longhaul.models.errors import UserError
from longhaul.models.lm import LanguageModel
from longhaul.models.ops.cross_entropy.chunk import MAX_LOGITS_BYTES
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import WholeSequence

GIB = 2**30
SHORT, LONG = 512, 1024  # tokens of the measured steps


@dataclass(frozen=True)
class Part:
    """One line of a prediction."""

    name: str
    bytes: float
    how: str


def predict(config: TrainConfig, world_size: int) -> list[Part]:
    """What a process of a run holds at its peak, part by part.

    Raises:
        UserError: the run has a dimension whose memory is not predicted.
    """
    config = config.resolve(world_size)
    parallel, train = config.parallel, config.train
    for name in ("tensor", "pipeline", "expert"):
        size = getattr(parallel, f"{name}_parallel_size")
        if size > 1:
            raise UserError(
                f"longhaul plan memory knows data and sequence parallelism, not parallel.{name}_parallel_size {size}: leave it "
                "at 1 for a prediction that is too high by what it saves."
            )
    degrees = parallel.degrees(world_size)
    whole = min(config.data.seq_length, train.stream_tokens or config.data.seq_length)
    tokens = -(-whole // degrees.sequence)
    with torch.device("meta"):
        model = LanguageModel(config.model)
    blocks = [sum(parameter.numel() for parameter in layer.parameters()) for layer in model.layers]
    count = sum(parameter.numel() for parameter in model.parameters())
    sharing = degrees.data * degrees.sequence // degrees.replicate
    sharded = parallel.data_parallel_backend == "fsdp" and sharing > 1
    held = count / sharing if sharded else float(count)
    moments = 2 if config.optimizer.name == "adamw" else 0
    kept = f"1/{sharing} of {count:,}" if sharded else f"{count:,}"
    parts = [
        Part("parameters", 4 * held, f"{kept}, fp32"),
        Part("gradients", 4 * held, "the same"),
        Part("optimizer", 4 * moments * held, f"{moments} of the same"),
    ]
    if sharded:
        outside = count - sum(blocks)
        largest = max(blocks, default=0)
        gathered = 4.0 * (2 * outside + 3 * largest)
        parts.append(Part("gathered", gathered, "what lies outside blocks, and the largest block, with gradients"))
    saved, passing = activations(config, tokens)
    mode = train.activation_checkpointing
    parts += [
        Part("activations", saved, f"of {tokens:,} tokens, kept for the backward (train.activation_checkpointing {mode})"),
        Part("passing", passing, "the most that comes and goes beside them: one block's, the head's logits"),
    ]
    if degrees.sequence > 1:
        keys = _gathered(config, model, whole)
        parts.append(Part("gathered keys", keys, "keys and values of all processes of a sequence, one layer's"))
    if _device(config) == "cpu":
        parts.append(Part("Python and torch", peak_resident_gib() * GIB, "of this process, now"))
    return parts


def activations(config: TrainConfig, tokens: int) -> tuple[float, float]:
    """Bytes kept for the backward by all blocks, and bytes that come and go beside them, of `tokens` tokens."""
    letters = Counter(config.model.layers)
    kept, passing = 0.0, 0.0
    for letter, blocks in letters.items():
        peaks = {}
        for stacked in (1, 2):
            for length in (SHORT, LONG):
                peaks[stacked, length] = float(_peak(config, letter * stacked, length))
        one, two = (_line(peaks[stacked, SHORT], peaks[stacked, LONG], tokens) for stacked in (1, 2))
        kept += blocks * max(two - one, 0.0)
        passing = max(passing, one - max(two - one, 0.0))
    # Logits exist for a bounded number of tokens at once: beyond it they do not grow.
    most = MAX_LOGITS_BYTES // (4 * config.model.vocab_size)
    if tokens > most > LONG:
        passing -= 4 * config.model.vocab_size * (tokens - most)
    return kept, max(passing, 0.0)


def _line(short: float, long: float, tokens: int) -> float:
    return short + (long - short) / (LONG - SHORT) * (tokens - SHORT)


def _peak(config: TrainConfig, pattern: str, tokens: int) -> int:
    """The most bytes that a step of blocks `pattern` allocates at one time, parameters and their gradients not counted."""
    model = LanguageModel(replace(config.model, pattern=pattern, num_layers=len(pattern)))
    model.activation_checkpointing = config.train.activation_checkpointing
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    values = torch.randint(config.model.vocab_size, (tokens,))
    shard = WholeSequence(Documents((0, tokens)))
    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision != "fp32"):
            out = model(values, shard, labels=values)
        out.loss_sum.backward()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def _gathered(config: TrainConfig, model: LanguageModel, tokens: int) -> float:
    """Keys and values that softmax attention holds of other processes, with their gradients."""
    mixers: list[Any] = [layer.mixer for layer in model.layers]
    widths: list[int] = [2 * mixer.num_kv_heads * mixer.head_dim for mixer in mixers if hasattr(mixer, "mask")]
    if not widths or config.parallel.attention != "all_gather":
        return 0.0
    return 2.0 * 4 * tokens * max(widths) / (config.parallel.attention_head_slices or 1)


def _device(config: TrainConfig) -> str:
    return "cuda" if config.train.device == "cuda" or (config.train.device == "auto" and torch.cuda.is_available()) else "cpu"


@contextmanager
def _silent() -> Iterator[None]:
    """The profiler's library writes lines of its own to the standard error."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
