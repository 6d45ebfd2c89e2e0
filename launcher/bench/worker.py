"""One side of `bench step` in a process of its own, so that its peak memory is its own.

It reads a command a line (`step`, one forward and backward; `memory`; `gradients`) and answers with a line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from longhaul.launcher.memory import keep_freed_memory
from longhaul.launcher.metrics.hardware import peak_resident_gib

from .child import own_output
from .sides import SIDES, Shape, Side

WEIGHTS = "weights.pt"


def make_side(name: str, shape: Shape, folder: Path) -> Side:
    """Build a side. The one that finds weights in the folder takes them; the one that does not leaves its own there."""
    torch.manual_seed(0)
    side = SIDES[name](shape)
    weights = folder / WEIGHTS
    if weights.exists():
        side.model.load_state_dict(torch.load(weights, mmap=True, weights_only=True))
    else:
        torch.save(side.named(lambda parameter: parameter), weights)
    return side


def step(side: Side, tokens: torch.Tensor) -> dict[str, float]:
    """One training step without the optimizer; gradients of the last one are kept."""
    side.model.zero_grad(set_to_none=True)
    start, processor = time.perf_counter(), time.process_time()
    loss = side.forward(tokens)
    middle = time.perf_counter()
    loss.backward()
    end = time.perf_counter()
    return {
        "forward": middle - start,
        "seconds": end - start,
        "processor": time.process_time() - processor,
        "loss": loss.item(),
    }


def main() -> None:
    answers = own_output()
    keep_freed_memory()  # as in training; both sides alike
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    shape, folder = Shape(**spec["shape"]), Path(spec["folder"])
    side, tokens = make_side(spec["side"], shape, folder), shape.tokens()
    idle = peak_resident_gib()
    print(json.dumps({"parameters": sum(p.numel() for p in side.model.parameters())}), file=answers)
    for line in sys.stdin:
        command = line.strip()
        if command == "step":
            answer: dict[str, object] = {**step(side, tokens)}
        elif command == "memory":
            answer = {"peak_gib": peak_resident_gib(), "idle_gib": idle}
        else:
            path = folder / f"{spec['side']}.pt"
            torch.save(side.named(lambda parameter: parameter.grad), path)
            answer = {"path": str(path)}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
