"""Memory that tensors free stays in the process, where the C library lets us say so, and is given back between chunks."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
from longhaul.launcher.memory import keep_freed_memory
kept = keep_freed_memory()
torch.set_num_threads(1)
for turn in range(40):  # the heap's holes find their sizes in the first few
    if turn == 30:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)  # 64 MiB
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

CHUNKS = """
import torch
from longhaul.launcher.memory import RUNS, giving_back, keep_freed_memory
from longhaul.launcher.metrics.hardware import resident_gib
keep_freed_memory()
torch.set_num_threads(1)
run = giving_back(lambda value, scale: value * scale)
large = torch.ones(1 << 26)  # 256 MiB
small = torch.ones(1)  # above it in the heap, so that the heap cannot shrink
del large
held = []
for turn in range(RUNS + 1):
    held.append(resident_gib())
    assert run(turn, scale=2) == 2 * turn
    if turn == 1:
        large = torch.ones(1 << 26)
        del large
held.append(resident_gib())
print(*(before - after for before, after in zip(held, held[1:])))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
@pytest.mark.parametrize("asked", (True, False))
def test_a_large_tensor_takes_the_pages_of_the_one_before(asked: bool) -> None:
    environment = {} if asked else {"MALLOC_ARENA_MAX": "8"}  # a person's own wishes come first
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env={"PATH": "", **environment}
    )
    kept, faults = run.stdout.split()
    assert kept == str(asked)
    pages = 10 * 16384
    assert (int(faults) < 0.2 * pages) == asked


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_free_pages_are_given_back_before_the_first_chunk_and_every_64th() -> None:
    run = subprocess.run([sys.executable, "-c", CHUNKS], capture_output=True, text=True, check=True, env={"PATH": ""})
    gone = [float(value) > 0.2 for value in run.stdout.split()]
    assert [turn for turn, freed in enumerate(gone) if freed] == [0, 64]
