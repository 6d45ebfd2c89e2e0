"""Memory that tensors free stays in the process, where the C library lets us say so."""

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
