"""Train a model: `longhaul train`, `python -m longhaul.launcher.train`, or under torchrun `launcher/train.py`.

Exit codes: 0 the last step is done; 2 something to mend, told in one sentence; 75 stopped by SIGTERM, SIGUSR1 or Ctrl-C
after saving, so that the same command goes on.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # run as a script: our own folder must not offer its modules under bare names

from longhaul.launcher.signals import SAVED, StopRequest
from longhaul.models.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one process of a training job; arguments as `longhaul.launcher.parsing.parse` reads them."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log file or torchrun's pipe shows each step as it ends
    with StopRequest() as stop:
        try:
            return _train(list(sys.argv[1:] if argv is None else argv), stop)
        except UserError as error:
            if int(os.environ.get("RANK", "0")) == 0:
                print(f"error: {error}", file=sys.stderr, flush=True)
            _tell_torchrun(str(error), os.environ)
            return 2


def _train(argv: list[str], stop: StopRequest) -> int:
    # Imported late: handlers are in place before anything slow.
    import torch

    from longhaul.launcher.memory import keep_freed_memory
    from longhaul.launcher.parsing import parse
    from longhaul.launcher.trainer import Trainer
    from longhaul.parallel.runtime import Runtime

    environment = os.environ
    rank = int(environment.get("RANK", "0"))
    world_size = int(environment.get("WORLD_SIZE", "1"))
    config = parse(argv).resolve(world_size)
    if config.train.activation_checkpointing == "none":
        keep_freed_memory()  # time for memory: not where the run buys memory with time
    if config.train.deterministic:
        environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if world_size == 1 and "OMP_NUM_THREADS" not in environment:
        torch.set_num_threads(os.cpu_count() or 1)
    runtime = Runtime(
        rank=rank,
        world_size=world_size,
        local_rank=int(environment.get("LOCAL_RANK", rank)),
        init_method="env://",
        device=config.train.device,
        timeout=config.train.timeout,
        local_world_size=int(environment.get("LOCAL_WORLD_SIZE", world_size)),
    )
    try:
        trainer = Trainer(config, runtime, stop_signal=lambda: stop.signal)
        outcome = trainer.run()
    finally:
        runtime.close()
    if outcome.stop_signal:
        if runtime.is_main:
            print(f"stopped at step {outcome.step}; the same command goes on from there", flush=True)
        return SAVED
    if runtime.is_main:
        print(_summary(trainer.folder, outcome.step, outcome.held_out_loss), flush=True)
    return 0


def _summary(folder: Path, step: int, held_out_loss: float | None) -> str:
    lines = [f"done: {step} steps" + ("" if held_out_loss is None else f", held-out loss {held_out_loss:.3f} nats a token")]
    for name, what in (
        ("report.html", "report"),
        (f"step_{step}", "checkpoint"),
        ("metrics.jsonl", "metrics"),
        ("sample.txt", "sample"),
        ("resolved_config.yaml", "configuration"),
    ):
        if (folder / name).exists():
            lines.append(f"  {what + ':':15}{folder / name}")
    return "\n".join(lines)


def _tell_torchrun(message: str, environment: Mapping[str, str]) -> None:
    """Put the sentence where torchrun looks for the reason of a failure, so that its summary shows it."""
    path = environment.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))


if __name__ == "__main__":
    sys.exit(main())
