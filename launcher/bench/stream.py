"""`longhaul bench stream`: one training step on a stream longer than memory.

Each length runs in a process of its own, so that its peak memory is its own: chunk by chunk, and whole where the length is
at most `--unstreamed`. A first, unmeasured step of two chunks fills whatever is filled once. Gradients of the two ways are
compared where both ran.

Letters: `C` tokens of a chunk.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from longhaul.launcher.metrics.hardware import device_name, peak_memory_gib, reset_peak_memory, versions
from longhaul.launcher.parsing import build, from_file
from longhaul.models.borders import KEEP
from longhaul.models.config import LINEAR_MIXERS, ModelConfig
from longhaul.models.errors import UserError
from longhaul.models.lm import LanguageModel
from longhaul.models.ops.recompute import MODES
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import WholeSequence
from longhaul.models.streaming import LongStream, Streaming, check_streamable

LENGTHS = (1 << 16, 1 << 18, 1 << 20)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One measured step; `chunk` 0 is the whole stream at once."""

    length: int
    chunk: int
    keep: str
    device: str
    precision: str
    threads: int
    checkpointing: str


def measure(case: Case, config: ModelConfig, gradients: Path) -> dict[str, Any]:
    """Run the step in this process, and save its gradients."""
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    device = torch.device(case.device)
    with device:
        model = LanguageModel(config)
    model.activation_checkpointing = case.checkpointing

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bf16"):
            return model(*args, **kwargs)

    def step(length: int, chunk: int) -> tuple[float, int]:
        """The loss of a token, and the elements kept at borders."""
        model.zero_grad(set_to_none=True)
        tokens = torch.randint(config.vocab_size, (length + 1,), generator=torch.Generator().manual_seed(1))
        stream = LongStream(tokens[:-1], tokens[1:], torch.ones(length), Documents((0, length)))
        if chunk:
            streaming = Streaming(run, chunk, lambda documents, on: WholeSequence(documents, device, on), keep=case.keep)
            out = streaming.backward(stream, scale=1 / length)
            return float(out.loss_sum) / length, out.border_elements
        whole = [values.to(device) for values in stream[:3]]
        found = run(whole[0], WholeSequence(stream.documents, device), labels=whole[1], weights=whole[2])
        (found.loss_sum / length).backward()
        return found.loss_sum.item() / length, 0

    step(min(case.length, 2 * (case.chunk or 1024)), case.chunk)
    idle = peak_memory_gib(device)
    reset_peak_memory(device)
    start = time.perf_counter()
    loss, elements = step(case.length, case.chunk)  # the loss is on the host: the step is done
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    torch.save({name: gradient.cpu() for name, gradient in found.items()}, gradients)
    return {
        "length": case.length,
        "chunk": case.chunk,
        "seconds": seconds,
        "tokens_per_second": case.length / seconds,
        "peak_gib": peak_memory_gib(device),
        "before_gib": idle,
        "border_elements": elements,
        "loss": loss,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": device_name(device),
    }


def in_process(case: Case, config: ModelConfig, gradients: Path) -> dict[str, Any]:
    """`measure` in a fresh process."""
    spec = {"case": dataclasses.asdict(case), "config": dataclasses.asdict(config), "gradients": str(gradients)}
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name, "--measure", json.dumps(spec)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(case.threads)},
    )
    if done.returncode:
        raise UserError(
            f"The step of {case.length} tokens ({case.chunk or 'no'} tokens a chunk) ended with code {done.returncode}: its "
            "messages are above; if memory was short, lower --unstreamed or --chunk."
        )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def difference(first: Path, second: Path) -> float:
    """RMS of the difference of two files of gradients over RMS of the second, the worst tensor's."""
    one, two = (torch.load(path, weights_only=True) for path in (first, second))
    return max(float((one[name] - other).square().mean().sqrt() / other.square().mean().sqrt()) for name, other in two.items())


def show(results: list[dict[str, Any]], console: Console) -> None:
    """A table, a row a step."""
    table = Table("tokens", "chunk", "seconds", "tokens/s", "peak, GiB", "kept at borders", "gradients differ by")
    for row in results:
        error = row.get("gradient_error")
        table.add_row(
            f"{row['length']:,}",
            f"{row['chunk']:,}" if row["chunk"] else "whole",
            f"{row['seconds']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['peak_gib']:.3f}",
            f"{row['border_elements']:,}",
            "" if error is None else f"{error:.1e}",
        )
    console.print(f"{results[0]['device']}, {results[0]['parameters']:,} parameters")
    console.print(table)


def model_config(options: argparse.Namespace) -> ModelConfig:
    """Of a file, or of the small model that the options describe."""
    if options.config is not None:
        return from_file(options.config).model
    return ModelConfig(
        vocab_size=options.vocab,
        hidden_size=options.width,
        num_layers=options.layers,
        num_heads=options.heads,
        pattern="L",
        linear_mixer=options.mixer,
    )


def main(argv: Sequence[str]) -> int:
    """`longhaul bench stream`."""
    parser = argparse.ArgumentParser(prog="longhaul bench stream", description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of a stream (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=4096, help="tokens of a chunk (default: %(default)s)")
    parser.add_argument("--unstreamed", type=int, default=0, help="also run lengths up to this whole (default: none)")
    parser.add_argument("--keep", choices=KEEP, default="all", help="where border states wait (default: %(default)s)")
    parser.add_argument("--config", type=Path, help="take the model of a run's file, such as configs/linear_llama3_1b.yaml")
    parser.add_argument("--mixer", choices=LINEAR_MIXERS, default="linear_attention", help="(default: %(default)s)")
    for name, value in (("layers", 4), ("width", 256), ("heads", 4), ("vocab", 512)):
        parser.add_argument(f"--{name}", type=int, default=value, help="of the small model (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(default: %(default)s)")
    parser.add_argument("--checkpointing", choices=MODES, default="none", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure is not None:
        spec = json.loads(options.measure)
        config = build(ModelConfig, spec["config"])
        print(json.dumps(measure(Case(**spec["case"]), config, Path(spec["gradients"]))))
        return 0
    for name, value in (("chunk", options.chunk), ("lengths", min(options.lengths)), ("threads", options.threads)):
        if value < 1:
            raise UserError(f"--{name} is {value}: give at least 1.")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device is {options.device}, but there is no GPU here: use cpu.")
    config, results = model_config(options), []
    with torch.device("meta"):
        check_streamable(LanguageModel(config))
    with tempfile.TemporaryDirectory(prefix="longhaul-bench-") as folder:
        for length in options.lengths:
            pair = []
            for chunk in (options.chunk, *([0] if length <= options.unstreamed else [])):
                case = Case(
                    length=length,
                    chunk=chunk,
                    keep=options.keep,
                    device=options.device,
                    precision=options.precision,
                    threads=options.threads,
                    checkpointing=options.checkpointing,
                )
                pair.append(Path(folder) / f"{length}-{chunk}.pt")
                results.append(in_process(case, config, pair[-1]))
            if len(pair) == 2:
                results[-2]["gradient_error"] = difference(*pair)
            for path in pair:
                path.unlink()
    show(results, Console())
    if options.json is not None:
        options.json.write_text(json.dumps({"versions": versions(), "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
