"""One layer of one mixer in a process of its own, for `bench mixers` and `bench generation`.

It reads a command a line and answers with a line of JSON:

    step            one forward and backward of `length` tokens
    memory          peak resident memory so far, and what was there before the first step
    fill N          bring the state to N tokens of one document
    tokens N        N tokens, one at a time, each from the state before it

Legend: T tokens, D width.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from longhaul.launcher.memory import keep_freed_memory
from longhaul.launcher.metrics.hardware import peak_resident_gib
from longhaul.models.config import ModelConfig
from longhaul.models.mixers.registry import MIXERS
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import KVState, WholeSequence
from longhaul.models.state import tensor_bytes

from .child import own_output

SOFTMAX = "attention"
HEAD_DIM = 64
PIECE = 1024  # tokens of a forward that fills a state


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """A mixer alone, without norm and feed-forward, with its default options and heads of 64."""

    mixer: str
    width: int = 512
    length: int = 8192

    def build(self) -> nn.Module:
        """The layer, seeded."""
        torch.manual_seed(0)
        pattern = "N" if self.mixer == SOFTMAX else "L"
        names: dict[str, Any] = {} if self.mixer == SOFTMAX else {"linear_mixer": self.mixer}
        config = ModelConfig(
            hidden_size=self.width, num_heads=max(1, self.width // HEAD_DIM), num_layers=4, pattern=pattern, **names
        )
        layer = MIXERS[self.mixer].build(config, layer=0)
        layer.reset_parameters()  # type: ignore[operator]
        return layer


class Layer:
    """The layer with its inputs and its state."""

    def __init__(self, shape: LayerShape) -> None:
        self.shape, self.module = shape, shape.build()
        draws = torch.Generator().manual_seed(1)
        self.x = torch.randn(shape.length, shape.width, generator=draws).requires_grad_()
        self.dy = torch.randn(shape.length, shape.width, generator=draws)
        self.states: dict[int, Any] = {}
        self.made: dict[int, int] = {}
        """By context: the state, and how many tokens it has read since."""

    def step(self) -> dict[str, float]:
        """Forward and backward of one document."""
        self.module.zero_grad(set_to_none=True)
        self.x.grad = None
        start = time.perf_counter()
        y, _ = self.module(self.x, WholeSequence(Documents((0, self.shape.length))))
        middle = time.perf_counter()
        y.backward(self.dy)
        return {"forward": middle - start, "seconds": time.perf_counter() - start}

    @torch.no_grad()
    def fill(self, context: int) -> dict[str, float]:
        """A state after `context` tokens: a recurrent layer reads them, softmax attention gets keys and values at random."""
        self.module.eval()
        start = time.perf_counter()
        if self.shape.mixer == SOFTMAX:
            heads, width = self.module.num_kv_heads, self.module.head_dim
            shape: tuple[int, int, int] = (context, heads, width)  # type: ignore[assignment]
            state: Any = KVState(torch.randn(shape), torch.randn(shape))
        else:
            state = None
            for position in range(0, context, PIECE):
                state = self._forward(min(PIECE, context - position), position, state)[1]
        self.states[context], self.made[context] = state, 0
        return {"seconds": time.perf_counter() - start, "state_bytes": tensor_bytes(state)}

    @torch.no_grad()
    def tokens(self, context: int, count: int) -> dict[str, float]:
        """Seconds of a token (median) that follows `context` tokens, and those made since."""
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            self.states[context] = self._forward(1, context + self.made[context], self.states[context])[1]
            seconds.append(time.perf_counter() - start)
            self.made[context] += 1
        return {"seconds": median(seconds)}

    def _forward(self, tokens: int, position: int, state: Any) -> tuple[Tensor, Any]:
        first = position % (self.shape.length - tokens + 1)
        shard = WholeSequence(Documents((0, tokens), first_position=position), keep_state=True)
        found: tuple[Tensor, Any] = self.module(self.x[first : first + tokens], shard, state)
        return found


def main() -> None:
    answers = own_output()
    keep_freed_memory()  # as in training
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    layer = Layer(LayerShape(**spec["shape"]))
    idle = peak_resident_gib()
    parameters = sum(parameter.numel() for parameter in layer.module.parameters())
    flops = layer.module.flops_per_token(layer.shape.length)  # type: ignore[operator]
    print(json.dumps({"parameters": parameters, "flops_per_token": flops}), file=answers)
    for line in sys.stdin:
        command, *numbers = line.split()
        answer: dict[str, float]
        if command == "step":
            answer = layer.step()
        elif command == "memory":
            answer = {"peak_gib": peak_resident_gib(), "idle_gib": idle}
        elif command == "fill":
            answer = layer.fill(int(numbers[0]))
        else:
            answer = layer.tokens(int(numbers[0]), int(numbers[1]))
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
