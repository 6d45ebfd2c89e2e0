"""`longhaul doctor`: what this machine has, what is missing, and which extra brings it."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

MIN_PYTHON = (3, 10)
MIN_TORCH = (2, 9)
GIB = 1 << 30

# Distributions that training needs, beside torch.
REQUIRED = ("numpy", "einops", "safetensors", "jsonargparse", "rich", "matplotlib", "tensorboard", "pyyaml")

# Distribution -> the extra that installs it, and what it is for.
OPTIONAL: dict[str, tuple[str, str]] = {
    "pyarrow": ("data", "training on .parquet files"),
    "tokenizers": ("data", "Hugging Face tokenizer files"),
    "transformers": ("hf", "models to and from Hugging Face"),
    "triton": ("triton", "own GPU kernels; torch where absent"),
    "flash-attn": ("flash-attn", "local softmax kernel; torch's own where absent"),
    "flash-linear-attention": ("fla", "reference kernels to compare with"),
    "deepspeed": ("deepspeed", "ZeRO 1-3 as data-parallel backend"),
    "megatron-core": ("megatron", "our mixers inside Megatron models"),
    "mpi4py": ("mpi", "launching under mpirun"),
    "highspy": ("planner", "exact plans for uneven documents"),
    "scipy": ("planner", "bounds on plans, and exact ones without highspy"),
}


@dataclass(frozen=True)
class Check:
    """One fact about the machine. `ok` is None where nothing depends on it."""

    name: str
    value: str
    ok: bool | None = None


@dataclass(frozen=True)
class OptionalPackage:
    """An optional distribution: its version (None: not installed), the extra that installs it and its purpose."""

    package: str
    version: str | None
    extra: str
    purpose: str


def main(argv: list[str]) -> int:
    """Print the report. Returns 0 if Longhaul can train here, 1 if something it needs is missing."""
    parser = argparse.ArgumentParser("longhaul doctor", description="Say what this machine has and what is missing.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_args(argv)

    checks = examine()
    optional = [OptionalPackage(name, _version(name), *about) for name, about in OPTIONAL.items()]
    healthy = all(check.ok is not False for check in checks)
    if arguments.json:
        found = {
            "ok": healthy,
            "checks": [asdict(check) for check in checks],
            "optional": [asdict(package) for package in optional],
        }
        print(json.dumps(found, indent=2))
    else:
        _print_tables(checks, optional, healthy)
    return 0 if healthy else 1


def examine() -> list[Check]:
    """Everything that decides whether and how Longhaul runs here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        Check("Longhaul", _version("longhaul") or "not installed"),
        Check("Python", platform.python_version(), sys.version_info >= MIN_PYTHON),
        Check("CPU cores", f"{cores} usable"),
        Check("memory", _memory()),
        *_torch(),
        *(Check(name, _version(name) or "missing", _version(name) is not None) for name in REQUIRED),
    ]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> str:
    """Memory of the machine, or of the container where that has less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    group = Path("/sys/fs/cgroup/memory.max")
    if group.is_file() and (limit := group.read_text().strip()).isdecimal():
        limits.append(int(limit))
    return f"{min(limits) / GIB:.1f} GiB"


def _torch() -> list[Check]:
    """torch, its GPUs and its communication backends; an installation that does not import is a finding too."""
    try:
        import torch

        from longhaul.parallel.backends import available_backends
    except (ImportError, OSError) as error:  # OSError: a shared library of torch is missing
        return [Check("torch", f"does not import: {error}", False)]

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    checks = [Check("torch", torch.__version__, version >= MIN_TORCH)]
    count = torch.cuda.device_count()
    if count == 0:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built for the CPU"
        checks.append(Check("GPUs", f"none ({built})"))
    for index in range(count):
        gpu = torch.cuda.get_device_properties(index)
        checks.append(Check(f"GPU {index}", f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, sm_{gpu.major}{gpu.minor}"))
    backends = available_backends()
    has = {True: "available", False: "not in this build of torch"}
    checks.append(Check("gloo", has[backends["gloo"]], backends["gloo"]))
    checks.append(Check("nccl", has[backends["nccl"]], backends["nccl"] if count else None))
    return checks


def _print_tables(checks: list[Check], optional: list[OptionalPackage], healthy: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    marks = {True: "[green]ok[/]", False: "[red]missing[/]", None: ""}
    facts = Table(title="This machine", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("", "found", ""):
        facts.add_column(column)
    for check in checks:
        facts.add_row(check.name, check.value, marks[check.ok])

    # Rich reads [data] as a style unless the bracket is escaped.
    extras = Table(title=r"Optional: pip install 'longhaul\[EXTRA]'", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("package", "found", "extra", "for"):
        extras.add_column(column)
    for package in optional:
        extras.add_row(package.package, package.version or "[dim]-[/]", package.extra, package.purpose)

    console = Console()
    console.print(facts)
    console.print(extras)
    console.print("Longhaul can train here." if healthy else "Longhaul cannot train here: see what is [red]missing[/].")
