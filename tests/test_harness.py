"""The harness itself: a test tool that cannot fail proves nothing."""

import itertools
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import torch
import torch.distributed as dist

from tests.harness import BACKENDS, RankError, RankTimeout, cases, numerics, pool, run_ranks
from tests.harness.numerics import assert_bitwise_equal, assert_close, assert_trees_close, relative_error

SIZES = [1, 2, 3, 4]


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


def reduce_ranks(rank: int, world_size: int, backend: str = "gloo") -> float:
    total = torch.tensor([float(rank + 1)], device="cuda" if backend == "nccl" else "cpu")
    dist.all_reduce(total)
    return total.item()


def who(rank: int, world_size: int, greeting: str) -> tuple[int, int, str, int]:
    return rank, world_size, greeting, os.getpid()


def describe_process(rank: int, world_size: int) -> dict[str, Any]:
    threads = len(os.listdir(f"/proc/{os.getppid()}/task"))
    return {"num_threads": torch.get_num_threads(), "server_threads": threads, "draw": torch.rand(1).item()}


def fail_on(rank: int, world_size: int, culprits: tuple[int, ...]) -> None:
    dist.barrier()
    if rank in culprits:
        time.sleep(0.15 * culprits.index(rank))
        raise KeyError(f"boom on {rank}")
    dist.barrier()


def fail_quietly(rank: int, world_size: int) -> None:
    pytest.fail("not an Exception but an outcome")


def die_on(rank: int, world_size: int, culprit: int, code: int) -> None:
    if rank == culprit:
        os._exit(code)
    dist.barrier()


def stay_away(rank: int, world_size: int, absent: int) -> None:
    while rank == absent:
        time.sleep(0.01)


def return_a_socket(rank: int, world_size: int) -> Any:
    import socket

    return socket.socket()


def echo(rank: int, world_size: int, tensor: torch.Tensor) -> dict[str, Any]:
    return {"same": tensor, "graph": torch.ones(2, requires_grad=True) * 2, "slice": torch.arange(10**6)[:2]}


def uninitialised(rank: int, world_size: int) -> list[torch.Tensor]:
    return make_uninitialised()


def make_uninitialised() -> list[torch.Tensor]:
    like = torch.zeros(3, dtype=torch.bfloat16)
    return [
        torch.empty(2, 3),
        torch.empty(4, dtype=torch.float64, requires_grad=True),
        torch.empty(2, dtype=torch.complex64),
        torch.empty_like(like),
        like.new_empty((5,)),
        torch.empty_strided((2, 2), (2, 1)),
    ]


def warn(rank: int, world_size: int) -> None:
    warnings.warn("this is ours", UserWarning, stacklevel=1)


def count_groups(rank: int, world_size: int, new: int) -> int:
    for _ in range(new):
        dist.new_group(range(world_size))
    return dist.distributed_c10d.get_pg_count()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world_size", SIZES)
def test_collective_sums_over_ranks(world_size: int, backend: str) -> None:
    expected = {1: 1.0, 2: 3.0, 3: 6.0, 4: 10.0}[world_size]
    assert run_ranks(reduce_ranks, world_size, backend=backend) == [expected] * world_size


@pytest.mark.parametrize("world_size", SIZES)
def test_results_come_by_rank_from_warm_processes(world_size: int) -> None:
    first = run_ranks(who, world_size, greeting="hello")
    assert [result[:3] for result in first] == [(rank, world_size, "hello") for rank in range(world_size)]
    assert run_ranks(who, world_size, greeting="hello") == first, "the second cell ran in other processes"
    assert len({pid for *_, pid in first} | {os.getpid()}) == world_size + 1


def test_ranks_have_one_thread_a_fixed_seed_and_a_server_safe_to_fork() -> None:
    expected = torch.rand(1, generator=torch.Generator().manual_seed(0)).item()
    for _ in range(2):
        for result in run_ranks(describe_process, 2):
            assert result == {"num_threads": 1, "server_threads": 1, "draw": expected}


def test_first_failing_rank_is_named_and_the_next_cell_works() -> None:
    before = run_ranks(who, 3, greeting="")
    with pytest.raises(RankError, match="boom on 1") as caught:
        run_ranks(fail_on, 3, culprits=(1, 0))
    assert (caught.value.rank, caught.value.kind) == (1, "KeyError")
    assert "in fail_on" in str(caught.value)
    after = run_ranks(who, 3, greeting="")
    assert not {pid for *_, pid in before} & {pid for *_, pid in after}


def test_outcomes_of_pytest_and_bad_results_are_failures() -> None:
    with pytest.raises(RankError, match="not an Exception but an outcome"):
        run_ranks(fail_quietly, 1)
    with pytest.raises(RankError, match="cannot pickle"):
        run_ranks(return_a_socket, 1)


def test_function_that_ranks_cannot_import_is_refused() -> None:
    def local(rank: int, world_size: int) -> None: ...

    with pytest.raises(AttributeError, match="local"):
        run_ranks(local, 1)


@pytest.mark.parametrize("culprit", [0, 1])
def test_dead_rank_is_reported_at_once(culprit: int) -> None:
    run_ranks(reduce_ranks, 2)
    start = time.monotonic()
    with pytest.raises(RankError, match="exit code 7") as caught:
        run_ranks(die_on, 2, culprit=culprit, code=7)
    assert (caught.value.rank, caught.value.kind) == (culprit, "exit")
    assert time.monotonic() - start < 30, "it waited for the time-out"
    assert run_ranks(reduce_ranks, 2) == [3.0, 3.0]


def test_rank_killed_between_cells_is_reported() -> None:
    victim = run_ranks(who, 2, greeting="")[1][3]
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(RankError, match="rank 1 of 2 died"):
        run_ranks(reduce_ranks, 2)
    assert run_ranks(reduce_ranks, 2) == [3.0, 3.0]


def test_time_out_kills_names_the_ranks_and_shows_their_stack() -> None:
    pids = [pid for *_, pid in run_ranks(who, 3, greeting="")]
    with pytest.raises(RankTimeout, match="in stay_away") as caught:
        run_ranks(stay_away, 3, absent=1, timeout=0.3)
    assert caught.value.ranks == [1]
    assert "in stay_away" in str(caught.value)
    assert not any(is_alive(pid) for pid in pids)
    assert run_ranks(reduce_ranks, 3) == [6.0, 6.0, 6.0]


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_interrupted_cell_leaves_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    pids = [pid for *_, pid in run_ranks(who, 2, greeting="")]

    def interrupt(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pool._Pool, "_collect", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_ranks(stay_away, 2, absent=0)
    assert not any(is_alive(pid) for pid in pids)
    assert run_ranks(reduce_ranks, 2) == [3.0, 3.0]


def test_closed_pools_leave_no_ranks_and_no_files() -> None:
    pids = [pid for *_, pid in run_ranks(who, 2, greeting="")]
    folder = pool._pools[2, "gloo"].folder
    assert folder.exists()
    pool.close_pools()
    assert not any(is_alive(pid) for pid in pids)
    assert not folder.exists()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.int64, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (0, 3), (4, 3)], ids=["scalar", "empty", "matrix"])
def test_tensors_cross_by_value(dtype: torch.dtype, shape: tuple[int, ...], generator: torch.Generator) -> None:
    tensor = (torch.rand(shape, generator=generator, dtype=torch.float64) * 100).to(dtype)
    (result,) = run_ranks(echo, 1, tensor=tensor.mT if len(shape) == 2 else tensor)
    assert_bitwise_equal(result["same"].mT if len(shape) == 2 else result["same"], tensor, "same")
    assert not result["graph"].requires_grad
    assert result["slice"].untyped_storage().nbytes() == 16, "a view brought its whole storage along"


def test_many_tensors_cross_without_file_descriptors() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    tensor = torch.ones(7)
    kept = [run_ranks(echo, 1, tensor=tensor)]
    before = descriptors()
    kept += [run_ranks(echo, 1, tensor=tensor) for _ in range(20)]
    assert descriptors() == before


def test_warning_filters_of_the_caller_hold_in_ranks() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RankError, match="this is ours"):
            run_ranks(warn, 1)
        warnings.simplefilter("ignore")
        run_ranks(warn, 1)


def test_pool_with_too_many_groups_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "MAX_GROUPS", 3)
    pool.close_pools()
    assert [run_ranks(count_groups, 1, new=2)[0] for _ in range(3)] == [3, 5, 3]


def test_uninitialised_memory_is_poisoned_here_and_in_ranks() -> None:
    for tensors in (make_uninitialised(), *run_ranks(uninitialised, 2)):
        assert all(tensor.isnan().all() for tensor in tensors)
    assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    assert torch.empty(3, dtype=torch.float64, requires_grad=True).requires_grad


def test_error_measure_has_the_documented_value() -> None:
    reference = torch.tensor([3.0, -4.0], dtype=torch.float64)
    assert relative_error(reference * 1.5, reference) == pytest.approx(0.5)
    zero = torch.zeros(4, dtype=torch.float64)
    assert relative_error(zero + 1e-6, zero) == pytest.approx(1e-6 / numerics.FLOOR)
    assert relative_error(zero[:0], zero[:0]) == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tolerance_sits_between_rounding_and_a_mistake(dtype: torch.dtype, generator: torch.Generator) -> None:
    reference = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    assert_close(reference.to(dtype), reference, "rounded")
    with pytest.raises(AssertionError, match="scaled"):
        assert_close((reference * (1 + 3 * numerics.TOLERANCE[dtype])).to(dtype), reference, "scaled")
    with pytest.raises(AssertionError, match="scaled"):
        assert_close(reference * (1 + 1e-9), reference, "scaled")


@pytest.mark.parametrize("poisoned", ["actual", "reference", "both"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_never_pass(poisoned: str, value: float) -> None:
    good, bad = torch.ones(5), torch.ones(5)
    bad[3] = value
    actual, reference = {"actual": (bad, good), "reference": (good, bad), "both": (bad, bad)}[poisoned]
    with pytest.raises(AssertionError, match=r"gradient of w.*worst at \(3,\)"):
        assert_close(actual, reference, "gradient of w")
    with pytest.raises(AssertionError):
        assert_close(actual, reference, "gradient of w", tolerance=1e30)


def test_message_names_tensor_error_and_worst_entry() -> None:
    reference = torch.ones(4, 3, dtype=torch.float64)
    actual = reference.clone()
    actual[2, 1] = 1.5
    with pytest.raises(
        AssertionError, match=r"dk: relative RMS error 1\.4\d+e-01 .* worst at \(2, 1\): 1\.5 instead of 1"
    ):
        assert_close(actual, reference, "dk")
    with pytest.raises(AssertionError, match=r"dk: shape \(4, 1\), expected \(4, 3\)"):
        assert_close(actual[:, :1], reference, "dk")


def test_bitwise_equality_sees_one_bit() -> None:
    ones = torch.ones(3, dtype=torch.float64)
    assert_bitwise_equal(ones, ones.clone(), "same")
    above = torch.nextafter(ones, 2 * ones)
    for actual in (torch.stack([ones[0], above[0], ones[0]]), ones.float(), ones[:2], ones * float("nan")):
        with pytest.raises(AssertionError, match="state"):
            assert_bitwise_equal(actual, ones, "state")
    with pytest.raises(AssertionError, match="NaN"):
        assert_bitwise_equal(ones * float("nan"), ones * float("nan"), "state")


def test_trees_are_compared_entry_by_entry() -> None:
    one, two = torch.ones(2, dtype=torch.float64), torch.full((2,), 2.0, dtype=torch.float64)
    tree = {"state": (Pair(one, two), None), "loss": 3.0, "count": 2}
    assert_trees_close({**tree, "loss": 3.0 + 1e-14}, tree, "model")
    wrong = {
        r"model\['state'\]\[0\].right": {**tree, "state": (Pair(one, one), None)},
        r"model\['state'\]\[1\]": {**tree, "state": (Pair(one, two), one)},
        r"model\['loss'\]": {**tree, "loss": 3.0 + 1e-8},
        r"model\['count'\]": {**tree, "count": 3},
        "keys": {"state": tree["state"], "loss": 3.0},
        "expected a tensor": {**tree, "state": (Pair(one, None), None)},  # type: ignore[arg-type]
        "sequence of 2": {**tree, "state": (Pair(one, two),)},
    }
    for message, actual in wrong.items():
        with pytest.raises(AssertionError, match=message):
            assert_trees_close(actual, tree, "model")


def test_slow_log_decay_remembers_and_varies(generator: torch.Generator) -> None:
    decay = cases.slow_log_decay(63, 4, generator)
    assert decay.shape == (63, 4) and decay.dtype is torch.float64
    assert (decay < 0).all() and (-1 / decay >= 10 * 63).all()
    assert decay.unique().numel() == decay.numel() and decay.max() / decay.min() < 0.2
    assert cases.slow_log_decay(0, 4, generator, key_width=2, dtype=torch.float32).shape == (0, 4, 2)


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 63, 64])
def test_document_tables_partition_the_stream(num_tokens: int) -> None:
    tables = cases.document_tables(num_tokens)
    assert list(tables) == ["one", "many_short", "edge", "spanning", "mixed"]
    for name, bounds in tables.items():
        assert bounds[0] == 0 and bounds[-1] == num_tokens, name
        assert all(first < second for first, second in itertools.pairwise(bounds)), name


def test_document_tables_are_what_their_names_say() -> None:
    tables = cases.document_tables(64)
    lengths = {name: [b - a for a, b in itertools.pairwise(bounds)] for name, bounds in tables.items()}
    assert lengths["one"] == [64]
    assert set(lengths["many_short"]) == {1, 2, 3}
    assert tables["edge"] == (0, 16, 22, 32, 43, 48, 64)
    assert tables["spanning"] == (0, 8, 56, 64)
    assert tables["mixed"] == (0, 1, 3, 6, 12, 51, 61, 63, 64)


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 63, 64])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_rank_lengths_partition_the_stream(num_tokens: int, world_size: int) -> None:
    for name, lengths in cases.rank_lengths(num_tokens, world_size).items():
        assert len(lengths) == world_size and sum(lengths) == num_tokens and min(lengths) >= 0, name


def test_rank_lengths_are_what_their_names_say() -> None:
    assert cases.rank_lengths(63, 1) == {"even": (63,)}
    assert cases.rank_lengths(63, 2) == {
        "even": (32, 31),
        "uneven": (62, 1),
        "empty_first": (0, 63),
        "empty_last": (63, 0),
    }
    assert cases.rank_lengths(63, 4) == {
        "even": (16, 16, 16, 15),
        "uneven": (11, 19, 1, 32),
        "empty_first": (0, 21, 21, 21),
        "empty_middle": (21, 21, 0, 21),
        "empty_last": (21, 21, 21, 0),
    }
