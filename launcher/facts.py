"""What the report says about a run besides its numbers."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .data import Data, byte_unigram_nats, describe, token_counts
from .engines import DEFAULTS, KEYS

_COUNTED_TOKENS = 4 << 20  # enough for the frequencies of single tokens


def describe_run(config: TrainConfig, data: Data, parameters: int, world_size: int) -> dict[str, Any]:
    """Facts by the names that `Metrics.record` knows."""
    model, parallel, batch = config.model, config.parallel, config.train.global_batch_size or 1
    resume = f"longhaul train --config {config.checkpoint.folder}/resolved_config.yaml"
    if world_size > 1:
        resume = f"torchrun --nproc-per-node={world_size} launcher/train.py{resume.removeprefix('longhaul train')}"
    return {
        "title": config.checkpoint.folder.rstrip("/").rsplit("/", 1)[-1],
        "model": {
            "pattern": model.layers,
            "linear mixer": model.linear_mixer,
            "hidden size": model.hidden_size,
            "heads": model.num_heads,
            "vocabulary": model.vocab_size,
        },
        "parameters": parameters,
        "parallel": {
            "data": parallel.data_parallel_size,
            "tensor": parallel.tensor_parallel_size,
            "pipeline": parallel.pipeline_parallel_size,
            "sequence": parallel.sequence_parallel_size,
            "exchange": parallel.exchange,
            "attention": parallel.attention,
            "layout": parallel.layout,
            **{name: getattr(parallel, name) for name in KEYS if getattr(parallel, name) != DEFAULTS.get(name)},
        },
        "command": _command(world_size),
        "data": {
            "documents": str(describe(data.train_corpus)),
            "held out": "none" if data.held_out_corpus is None else str(describe(data.held_out_corpus)),
            "tokens in a stream": config.data.seq_length,
            "tokens in a step": batch * config.data.seq_length,
        },
        "dtype": config.train.precision,
        "resume_command": resume,
    }


def _command(world_size: int) -> str:
    """How this run was started, as it could be typed again."""
    program = Path(sys.argv[0])
    if program.is_absolute() and program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    words = [program.name if program.name == "longhaul" else str(program), *sys.argv[1:]]
    before = ["torchrun", f"--nproc-per-node={world_size}"] if world_size > 1 else ["python"] if program.suffix == ".py" else []
    return shlex.join([*before, *words])


def baselines(data: Data) -> dict[str, float]:
    """What a model must beat on the held-out documents, in nats per token."""
    found = {"uniform": math.log(data.tokenizer.vocab_size)}
    if data.validation is not None and len(data.validation):
        counts = token_counts(data.train_corpus, data.tokenizer.vocab_size, _COUNTED_TOKENS)
        found["unigram"] = byte_unigram_nats(counts, data.validation)
    return found
