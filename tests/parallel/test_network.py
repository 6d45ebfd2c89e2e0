"""The probe: the same numbers on every rank, of the wire that is there."""

import pytest
import torch.distributed as dist

from longhaul.models.errors import UserError
from longhaul.parallel.comm import Comm, Wire
from longhaul.parallel.network import LABEL, Link, Network, probe
from tests.harness import run_ranks

DELAY, BANDWIDTH = 2e-3, 50e6


def probed(rank: int, world_size: int, slow: bool) -> tuple[Network, bool]:
    """The network, and whether only the probe was counted."""
    comm = Comm(dist.group.WORLD, wire=Wire(DELAY, BANDWIDTH) if slow else None)
    network = probe(comm, repeats=3)
    return network, comm.ledger.total().bytes == comm.ledger.total(LABEL).bytes > 0


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_agree(ranks: int) -> None:
    results = run_ranks(probed, ranks, slow=False)
    network = results[0][0]
    assert network.ranks == ranks and network.message.latency_s > 0 and network.hop.latency_s > 0 and network.forwards
    assert network.with_numbers(network.numbers()) == network
    assert results == [(network, True)] * ranks


def test_a_slow_wire_is_seen() -> None:
    network, _ = run_ranks(probed, 2, slow=True)[0]
    # The emulation promises no less than the delay.
    assert network.message.latency_s > 0.9 * DELAY
    assert network.hop.latency_s > 0.9 * DELAY
    assert network.collective.latency_s > 0.9 * DELAY


def test_one_rank_has_no_links() -> None:
    comm = Comm(None)
    assert probe(comm).ranks == 1
    assert comm.ledger.total().calls == 0


def test_links() -> None:
    assert Link(1.0, 10.0).seconds(20) == 3.0
    network = Network.even(5, 1.0, 10.0)
    assert network.message == network.hop == Link(1.0, 10.0) and network.collective == Link(3.0, 10.0)
    for numbers in ((-1.0, 1.0), (0.0, 0.0)):
        with pytest.raises(UserError, match=rf"latency_s {numbers[0]} and bytes_per_s {numbers[1]}"):
            Link(*numbers)
