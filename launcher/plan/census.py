"""What a model's layers compute and send, by the name of their mixer.

Read off the blocks themselves: FLOPs from `flops_per_token`, states and halos from one token sent through a block, so that
no mixer needs a line here.

Legend: T tokens, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longhaul.models.block import Block
from longhaul.models.config import ModelConfig
from longhaul.models.lm import LanguageModel
from longhaul.models.ops.recurrence import Recurrence
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import WholeSequence

NAMES = {"N": "attention", "*": "attention", "M": "mamba2"}
DENSE = "dense"  # a feed-forward layer alone
HEAD = "head"  # final norm, output projection and loss
BACKWARD = 3  # forward and backward FLOPs, in forwards
STATE_BYTES = 4  # states are kept and sent in float32


@dataclass(frozen=True)
class LayerFacts:
    """Equal layers of a model.

    Attributes:
        letter: of the pattern.
        mixer: name of the mixer, or `dense` for a layer without one.
        layers: how many.
        linear: forward and backward FLOPs a token, whatever the document's length.
        quadratic: forward and backward FLOPs a token squared.
        window: tokens a query sees; None: all.
        states: numbers in the state that travels along the sequence.
        halo: numbers in the tokens that a neighbour sends.
        key_value: numbers in the keys and values of a token (softmax).
        heads: numbers in the queries, keys, values and outputs of a token (softmax).
    """

    letter: str
    mixer: str
    layers: int
    linear: int
    quadratic: float = 0.0
    window: int | None = None
    states: int = 0
    halo: int = 0
    key_value: int = 0
    heads: int = 0


@dataclass(frozen=True)
class ModelFacts:
    """A model as the planner sees it; `head` is the FLOPs a token of the output projection, forward and backward."""

    layers: tuple[LayerFacts, ...]
    head: int
    parameters: int
    width: int


class _Recorder(WholeSequence):
    """Counts what one token's door calls would hand to the next rank."""

    def __init__(self) -> None:
        super().__init__(Documents((0, 1)), keep_state=True)
        self.states = self.halos = 0

    def scan(self, op: Recurrence, x: Any, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        out, final = super().scan(op, x, state)
        assert final is not None, "keep_state returns the state"
        self.states += final.numel()
        return out, final

    def halo(self, x: Tensor, width: int, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        context, tail = super().halo(x, width, state)
        self.halos += width * x[0].numel()
        return context, tail


def facts_of(config: ModelConfig) -> ModelFacts:
    """Layers by kind, in the order of the pattern; no weights are made."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in LanguageModel(config).parameters())
    letters = dict.fromkeys(config.layers)
    layers = tuple(_layer(config, letter) for letter in letters)
    return ModelFacts(layers, BACKWARD * 2 * config.vocab_size * config.hidden_size, parameters, config.hidden_size)


def _layer(config: ModelConfig, letter: str) -> LayerFacts:
    index, count = config.layers.index(letter), config.layers.count(letter)
    with torch.device("meta"):
        block = Block(config, index)
    if letter == "-":
        return LayerFacts(letter, DENSE, count, BACKWARD * block.flops_per_token(0))
    name = NAMES.get(letter, config.linear_mixer)
    linear = BACKWARD * block.flops_per_token(0)
    if name == "attention":
        mixer: Any = block.mixer
        # A causal query sees half of its document, so a token of a document of 2 tokens counts one key.
        a_key = block.flops_per_token(2) - block.flops_per_token(0)
        key_value = 2 * mixer.num_kv_heads * mixer.head_dim
        heads = 2 * mixer.num_heads * mixer.head_dim + key_value
        quadratic = BACKWARD * a_key / 2
        return LayerFacts(letter, name, count, linear, quadratic, mixer.mask.window, key_value=key_value, heads=heads)
    recorder = _Recorder()
    block.ffn = block.ffn_norm = None  # sends nothing
    block.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*block.parameters(), *block.buffers()):
            tensor.zero_()
        block(torch.zeros(1, config.hidden_size), recorder)
    return LayerFacts(letter, name, count, linear, states=recorder.states, halo=recorder.halos)
