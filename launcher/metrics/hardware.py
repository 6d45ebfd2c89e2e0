"""What this process runs on: device, peak FLOP/s, memory, versions of packages."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
from pathlib import Path

import torch

# Dense bf16 peaks, FLOP/s, without sparsity. The first key that occurs in the device's name counts.
_PEAKS = (("H200", 989e12), ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12), ("A100", 312e12))

_PACKAGES = ("longhaul", "torch", "numpy", "transformers", "triton", "flash-attn", "deepspeed", "megatron-core")


def peak_flops(device_name: str) -> float | None:
    """Peak dense bf16 FLOP/s of a GPU, or None if it is not known (a CPU's is not)."""
    return next((peak for key, peak in _PEAKS if key.lower() in device_name.lower()), None)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} thread(s) a process"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    known = [name for name in names if name.lower() != "unknown"]
    return known[0] if known else platform.processor() or platform.machine()


def reset_peak_memory(device: torch.device) -> None:
    """Forget earlier peaks, so that the next one is of the steps to come (CUDA only: a process's peak RSS stays)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far, GiB: the allocator's active bytes on CUDA, the process's resident set on CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_stats(device).get("active_bytes.all.peak", 0) / 2**30
    return peak_resident_gib()


def peak_resident_gib() -> float:
    """Peak resident set of this process, GiB."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: on Linux its peak also holds that of the parent at the time of the fork.
        kib = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(kib) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # macOS counts bytes


def resident_gib() -> float:
    """Resident set of this process now, GiB; where the system does not say, the peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_resident_gib()
    kib = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(kib) / 2**20


def versions() -> dict[str, str]:
    """Versions of Python, the system and the packages that matter here."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    found["cores"] = str(os.cpu_count())
    return found
