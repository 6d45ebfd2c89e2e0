"""Fixtures of all tests: one thread, a fixed seed, poisoned memory, and ranks that end with the session."""

import os

# Before torch is imported: the machine's cores belong to the ranks.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
from collections.abc import Iterator

import pytest
import torch

from tests.harness import poison, pool


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU for every rank")
    torch.set_num_threads(1)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let the fork server import torch while the first tests run, if any test needs ranks.

    Thousands of collected tests and all of torch stay: garbage is not looked for among them again.
    """
    gc.freeze()
    modules = {getattr(item, "module", None) for item in session.items}
    if not session.config.option.collectonly and any(hasattr(module, "run_ranks") for module in modules):
        pool.start_server()


def pytest_sessionfinish() -> None:
    pool.close_pools()


@pytest.fixture(scope="session", autouse=True)
def _poisoned_memory() -> Iterator[None]:
    with poison.poisoned():
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator with a fixed seed."""
    return torch.Generator().manual_seed(0)
