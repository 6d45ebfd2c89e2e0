"""The models of the table, on which tasks they stand, and what is to be seen there.

Initialised as published, with standard deviations of 0.1 where papers have 0.02: that was for widths of about 1,000, and goes as
width ** -1/2. A block is a mixer and a feed-forward layer; all models of a task are equally wide and deep.
"""

from __future__ import annotations

from typing import Any, NamedTuple

MARGIN = 0.02  # a difference in accuracy below it is none

_RECALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "ffn_hidden_size": 64,
    "initializer_range": 0.1,
    "tie_embeddings": False,
    "pattern": "L",
}
# State tracking. The feed-forward layer is so narrow that the answer has to be in the state: a wider one learns to tell a parity
# from a count of bits, which ends at the lengths trained on.
_TRACKING: dict[str, Any] = {**_RECALL, "hidden_size": 64, "num_layers": 1, "ffn_hidden_size": 2}
_ONE_MEMORY: dict[str, Any] = {"num_memories": 1, "top_k": 1, "shared_memory": False, "balance_weight": 0.0}
_LINEAR_CONV: dict[str, Any] = {**_ONE_MEMORY, "rule": "linear"}

BASE = {
    "mqar": _RECALL,
    "induction": _RECALL,
    "parity": _TRACKING,
    "modular": {**_TRACKING, "num_layers": 2},
    "long_recall": _RECALL,
}

MODELS: dict[str, dict[str, Any]] = {
    "attention": {"pattern": "N"},
    # Softmax attention in the second block, for which a short convolution in the first brings a key and its value together.
    "attention_conv": {"pattern": "LN", "linear_mixer": "mom", "mom": _LINEAR_CONV},
    "linear_attention": {"linear_mixer": "linear_attention"},
    # Basic linear attention with the short convolution and the normalised keys of Gated DeltaNet, and nothing else of it.
    "linear_attention_conv": {"linear_mixer": "mom", "mom": _LINEAR_CONV},
    "gated_deltanet": {"linear_mixer": "gated_deltanet"},
    # Four memories, one of them shared, of 2 heads of 8 x 8; the twin has one of 2 heads of 16 x 16.
    "mom": {"linear_mixer": "mom", "mom": {"num_memories": 3, "top_k": 2, "head_dim": 8}},
    "mom_one_memory": {"linear_mixer": "mom", "mom": _ONE_MEMORY},
    "mamba1": {"linear_mixer": "mamba1"},
    "mamba2": {"linear_mixer": "mamba2", "mamba2": {"state_size": 16, "head_dim": 16}},
    "memmamba": {"linear_mixer": "memmamba", "memmamba": {"summary_width": 32, "block": 16, "period": 2}},
    # No convolution: it would answer short documents, and the recurrence would not have to learn.
    "paralstm": {"linear_mixer": "paralstm", "paralstm": {"conv_width": 1, "iterations": 10, "tolerance": 1e-4}},
}

_LINES = ("attention", "attention_conv", "linear_attention", "linear_attention_conv", "gated_deltanet")

TABLE: dict[str, tuple[str, ...]] = {
    "mqar": (*_LINES, "mom_one_memory", "mom"),
    "induction": _LINES,
    "parity": ("linear_attention", "mamba2", "paralstm"),
    "modular": ("linear_attention", "mamba2", "paralstm"),
    "long_recall": ("attention", "attention_conv", "mamba1", "memmamba"),
}


def configuration(task: str, model: str) -> dict[str, Any]:
    """Keys of `ModelConfig`, but for the vocabulary; a mixer's options are a dictionary."""
    return {**BASE[task], **MODELS[model]}


class Contrast(NamedTuple):
    """`better` is claimed to answer more than `worse` at the test length `length`."""

    claim: str
    task: str
    better: str
    worse: str
    length: int
    equal_state: bool = False
    """Both carry as many bytes from token to token."""


def _contrasts(claim: str, tasks: dict[str, int], better: str, *worse: str, equal_state: bool = False) -> list[Contrast]:
    """One for each task (with its length) and each of the worse."""
    return [Contrast(claim, task, better, name, length, equal_state) for task, length in tasks.items() for name in worse]


CONTRASTS = (
    *_contrasts(
        "Gated DeltaNet answers more than basic linear attention",
        {"mqar": 72, "induction": 48},
        "gated_deltanet",
        *("linear_attention", "linear_attention_conv"),
        equal_state=True,
    ),
    *_contrasts("memories answer more than one as large", {"mqar": 72}, "mom", "mom_one_memory", equal_state=True),
    *_contrasts(
        "ParaLSTM tracks a state, linear layers do not", {"parity": 256, "modular": 256}, "paralstm", "mamba2", "linear_attention"
    ),
    *_contrasts("MemMamba recalls beyond its training length", {"long_recall": 256}, "memmamba", "mamba1"),
    *_contrasts("MemMamba recalls far beyond its training length", {"long_recall": 1024}, "memmamba", "mamba1"),
)
