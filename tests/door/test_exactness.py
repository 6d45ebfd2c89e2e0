"""Law 1 at the door: every mixer on N ranks equals itself in one process, every gradient on every rank."""

import pytest
import torch

from tests.harness.numerics import TOLERANCE
from tests.harness.pool import run_ranks

from .ranks import MIXERS, exactness


@pytest.mark.parametrize("world_size", (1, 2, 3, 4))
@pytest.mark.parametrize("mixer", MIXERS)
def test_ranks_equal_one_process(mixer: str, world_size: int) -> None:
    dtype = torch.float64
    for rank, worst in enumerate(run_ranks(exactness, world_size, mixer=mixer, num_tokens=37, dtype=dtype, timeout=120)):
        assert {"output", "input gradient", "final state 0", "state gradient 0"} <= set(worst)
        for tensor, (value, where) in worst.items():
            assert value <= TOLERANCE[dtype], f"rank {rank}, {tensor}: error {value:.1e} at {where}"


@pytest.mark.parametrize("mixer", MIXERS)
def test_single_precision(mixer: str) -> None:
    for rank, worst in enumerate(run_ranks(exactness, 3, mixer=mixer, num_tokens=63, dtype=torch.float32, timeout=120)):
        for tensor, (value, where) in worst.items():
            assert value <= TOLERANCE[torch.float32], f"rank {rank}, {tensor}: error {value:.1e} at {where}"
