"""A training step of `bench stream` in a process of its own, so that its peak memory is its own.

It reads a command a line and answers with a line of JSON:

    step N             forward and backward of N tokens; before the answer come lines {"forwards", "replays", "resident_gib"},
                       one each time the model has run
    memory             the peak so far, and what was held before the first step
    gradients PATH     saves those of the last step
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longhaul.launcher.memory import giving_back, keep_freed_memory
from longhaul.launcher.metrics.hardware import device_name, peak_memory_gib, peak_resident_gib, resident_gib
from longhaul.launcher.parsing import build
from longhaul.models.config import ModelConfig
from longhaul.models.lm import LanguageModel
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import WholeSequence
from longhaul.models.streaming import LongStream, Streaming

from .child import own_output


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a step runs; `chunk` 0 is the whole stream at once."""

    chunk: int
    keep: str
    device: str
    precision: str
    checkpointing: str


class Step:
    """A model and its steps.

    Args:
        tell: called whenever the model has run, with how often it has without gradients, and with them.
    """

    def __init__(self, way: Way, config: ModelConfig, tell: Callable[[int, int], None]) -> None:
        self.way, self.tell, self.device = way, tell, torch.device(way.device)
        torch.manual_seed(0)
        with self.device:
            self.model = LanguageModel(config)
        self.model.activation_checkpointing = way.checkpointing
        self.run_chunk = giving_back(self._run)
        self.runs = [0, 0]

    def __call__(self, length: int) -> dict[str, Any]:
        self.model.zero_grad(set_to_none=True)
        self.runs = [0, 0]
        draws = torch.Generator().manual_seed(1)
        tokens = torch.randint(self.model.config.vocab_size, (length + 1,), generator=draws)
        stream = LongStream(tokens[:-1], tokens[1:], torch.ones(length), Documents((0, length)))
        start, processor = time.perf_counter(), time.process_time()
        loss, elements = (self._streamed if self.way.chunk else self._whole)(stream)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        return {
            "loss": loss / length,
            "border_elements": elements,
            "seconds": seconds,
            "processor": time.process_time() - processor,
            "tokens_per_second": length / seconds,
        }

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.way.precision == "bf16"):
            found = self.model(*args, **kwargs)
        self.runs["labels" in kwargs] += 1
        self.tell(*self.runs)
        return found

    def _streamed(self, stream: LongStream) -> tuple[float, int]:
        def part(documents: Documents, keep_state: bool) -> WholeSequence:
            return WholeSequence(documents, self.device, keep_state)

        out = Streaming(self.run_chunk, self.way.chunk, part, keep=self.way.keep).backward(stream, scale=1 / len(stream.tokens))
        return float(out.loss_sum), out.border_elements

    def _whole(self, stream: LongStream) -> tuple[float, int]:
        tokens, labels, weights = (values.to(self.device) for values in stream[:3])
        found = self._run(tokens, WholeSequence(stream.documents, self.device), labels=labels, weights=weights)
        (found.loss_sum / len(tokens)).backward()
        return found.loss_sum.item(), 0

    def save_gradients(self, path: Path) -> None:
        found = {name: parameter.grad for name, parameter in self.model.named_parameters() if parameter.grad is not None}
        torch.save({name: gradient.cpu() for name, gradient in found.items()}, path)


def main() -> None:
    answers = own_output()
    spec = json.loads(sys.argv[1])
    if spec["way"]["checkpointing"] == "none":
        keep_freed_memory()  # as in training, of both ways
    torch.set_num_threads(spec["threads"])

    def tell(forwards: int, replays: int) -> None:
        print(json.dumps({"forwards": forwards, "replays": replays, "resident_gib": resident_gib()}), file=answers)

    step = Step(Way(**spec["way"]), build(ModelConfig, spec["config"]), tell)
    before = peak_memory_gib(step.device) if step.device.type == "cuda" else resident_gib()
    parameters = sum(parameter.numel() for parameter in step.model.parameters())
    print(json.dumps({"parameters": parameters, "device": device_name(step.device)}), file=answers)
    for line in sys.stdin:
        command, argument = (*line.split(maxsplit=1), "")[:2]
        answer: dict[str, Any] = {}
        if command == "step":
            answer = step(int(argument))
        elif command == "memory":
            peak = peak_memory_gib(step.device)
            answer = {"peak_gib": peak, "before_gib": before, "grown_gib": peak - before, "host_peak_gib": peak_resident_gib()}
        else:
            step.save_gradients(Path(argument.strip()))
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
