"""Chains cut by decay: the error is within its bound, and what the cut saves is saved; the horizon of gates."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longhaul.models.errors import UserError
from longhaul.models.ops.affine import AffineMap, Constant, Identity, LogScale
from longhaul.models.ops.chain import Link, fold
from longhaul.models.ops.segments import Documents
from longhaul.parallel.comm import Comm
from longhaul.parallel.exchange.base import own_links
from longhaul.parallel.exchange.cost import hops
from longhaul.parallel.exchange.reach import Reach, cut_chain, effective_horizon
from longhaul.parallel.exchange.registry import make_exchange
from longhaul.parallel.layout import SequenceLayout
from tests.harness import run_ranks
from tests.harness.numerics import assert_close

LENGTHS = (4, 20, 6, 30, 5)
DECAY = torch.tensor([-0.5, -1.25], dtype=torch.float64)


def problem(lengths: tuple[int, ...], reverse: bool, cuts: tuple[int, ...] = ()) -> tuple[AffineMap, tuple[Link, ...]]:
    """Maps of two heads on one part a rank, and the chain of documents that start at `cuts`."""
    documents = Documents((0, *cuts, sum(lengths)), first_position=3)
    chain = SequenceLayout.contiguous(sum(lengths), len(lengths), lengths).chain(documents)
    generator = torch.Generator().manual_seed(0)
    maps = AffineMap(torch.randn(len(lengths), 2, 3, 4, generator=generator, dtype=torch.float64), Constant(DECAY, lengths))
    return (maps.adjoint(maps.offset) if reverse else maps), chain


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-6])
def test_the_error_is_within_its_bound(tolerance: float, reverse: bool) -> None:
    maps, chain = problem(LENGTHS, reverse)
    exact, _ = fold(maps, chain, reverse=reverse)
    shorter, bounds = cut_chain(maps.linear, chain, tolerance)
    assert bounds == [math.exp(-0.5 * n) for n in LENGTHS if math.exp(-0.5 * n) <= tolerance]
    found, _ = fold(maps, shorter, reverse=reverse)
    order = list(range(len(chain)))[:: -1 if reverse else 1]
    dropped: torch.Tensor | None = None  # what entered the last part that was cut, times its bound
    for k in order:
        error = (found[k] - exact[k]).abs()
        if dropped is None:
            assert error.max() == 0
        else:
            assert (error <= dropped + 1e-15).all()
        if shorter[k].cut:
            dropped = math.exp(-0.5 * LENGTHS[k]) * exact[k].abs()
    assert (found - exact).abs().max() > 0  # something was dropped
    assert hops(shorter, reverse) < hops(chain, reverse)


def test_what_is_not_constant_is_not_cut() -> None:
    _, chain = problem(LENGTHS, False)
    for linear in (Identity(), LogScale(torch.full((5, 2), -100.0))):
        assert cut_chain(linear, chain, 0.5) == (chain, [])
    slow = Constant(torch.tensor([-100.0, -1e-3]), LENGTHS)  # the slowest head decides
    assert cut_chain(slow, chain, 0.5)[1] == []


def exchanges(rank: int, world_size: int, lengths: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    """Each exchange is exact on the chain that is cut; messages with and without the cut."""
    found: dict[str, tuple[int, int]] = {}
    for name in ("ring", "all_scan", "log_scan"):
        for reverse in (False, True):
            maps, chain = problem(lengths, reverse)
            own, messages = own_links(chain, rank), []
            for tolerance in (None, 1e-4):
                comm = Comm(dist.group.WORLD)
                exchange: Any = make_exchange(name, comm, reach_tolerance=tolerance)
                entering, _ = exchange.start(maps.select(own), chain, None, reverse).wait()
                used = chain if tolerance is None else cut_chain(maps.linear, chain, tolerance)[0]
                assert_close(entering, fold(maps, used, None, reverse)[0][own], name, tolerance=1e-12)
                messages.append(comm.ledger.total().messages)
            assert isinstance(exchange, Reach) and exchange.cuts == 1
            assert exchange.bound == math.exp(-0.5 * 20) and "4.5e-05" in exchange.describe()
            found[f"{name} {reverse}"] = messages[0], messages[1]
    return found


def test_exchanges_on_cut_chains() -> None:
    results = run_ranks(exchanges, 3, lengths=(4, 20, 6))
    for name in results[0]:
        exact, cut = (sum(result[name][k] for result in results) for k in (0, 1))
        assert cut < exact if name.startswith("log_scan") else cut == exact, name


def test_tolerances_that_make_no_sense_are_refused() -> None:
    comm = Comm(None)
    for tolerance in (0.0, 1.0, -1.0):
        with pytest.raises(UserError, match=f"reach_tolerance is {tolerance}"):
            make_exchange("ring", comm, reach_tolerance=tolerance)
    with pytest.raises(UserError, match="'all_gather' sends all maps to all"):
        make_exchange("all_gather", comm, reach_tolerance=0.1)


def test_effective_horizon() -> None:
    offset = torch.zeros(2, 2, 3, 4)
    gates = LogScale(torch.tensor([[-1.0, -0.0], [-3.0, -0.0]]))
    horizon = effective_horizon(AffineMap(offset, gates), [10, 30], eps=math.exp(-5))
    assert horizon.tolist() == [50.0, math.inf]  # 0.1 a token
    fixed = effective_horizon(AffineMap(offset, Constant(DECAY, (10, 30))), (10, 30), eps=math.exp(-5))
    assert fixed.tolist() == [10.0, 4.0]
    with pytest.raises(ValueError, match="Identity"):
        effective_horizon(AffineMap(offset, Identity()), (10, 30))
