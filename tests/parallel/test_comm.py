"""Every collective on 1 to 4 ranks: its result, what it is counted as, and an emulated wire."""

import time

import pytest
import torch
import torch.distributed as dist

from longhaul.parallel.comm import Comm, Count, Handle, Ledger, Wire
from tests.harness import run_ranks
from tests.harness.numerics import assert_bitwise_equal

every_size = pytest.mark.parametrize("ranks", [1, 2, 3, 4])


def _values(rank: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Numbers that tell the rank and the place; small integers, so that sums are exact. Not contiguous."""
    size = torch.Size(shape).numel()
    values = (torch.arange(size, dtype=torch.float64) + 100 * rank).to(dtype)
    return values.reshape(*shape[::-1]).permute(*range(len(shape) - 1, -1, -1))


def _assert_count(comm: Comm, label: str, kind: str, messages: int, size: int) -> None:
    """One call was counted, if anything was sent at all, under this label and kind and nowhere else."""
    if comm.size == 1:
        assert not comm.ledger.counts
        return
    assert list(comm.ledger.counts) == [(label, kind)]
    count = comm.ledger.counts[label, kind]
    assert (count.calls, count.messages, count.bytes) == (1, messages, size), f"{kind}: {count}"
    comm.ledger.reset()


def _twice(handle: Handle) -> torch.Tensor:
    first, second = handle.wait(), handle.wait()
    assert first is second
    return first


def gather_and_reduce(rank: int, P: int) -> None:
    comm = Comm(dist.group.WORLD)
    for dtype in (torch.float64, torch.float32, torch.int64, torch.uint8):
        own = _values(rank, 3, 2, dtype=dtype)
        every = torch.stack([_values(peer, 3, 2, dtype=dtype) for peer in range(P)])
        assert_bitwise_equal(_twice(comm.all_gather(own, "g")), every, "all_gather")
        _assert_count(comm, "g", "all_gather", P - 1, (P - 1) * 6 * dtype.itemsize)
    own = _values(rank, P, 5)
    mine = torch.stack([_values(peer, P, 5)[rank] for peer in range(P)]).sum(0)
    assert_bitwise_equal(_twice(comm.reduce_scatter(own, "r")), mine, "reduce_scatter")
    _assert_count(comm, "r", "reduce_scatter", P - 1, (P - 1) * 5 * 8)
    own, kept = _values(rank, 4, 3), _values(rank, 4, 3).clone()
    every = torch.stack([_values(peer, 4, 3) for peer in range(P)])
    assert_bitwise_equal(_twice(comm.all_reduce(own, "a")), every.sum(0), "all_reduce")
    _assert_count(comm, "a", "all_reduce", 2 * (P - 1), 2 * (P - 1) * 12 * 8 // P)
    assert_bitwise_equal(comm.all_reduce(own, "m", dist.ReduceOp.MAX).wait(), every.amax(0), "maximum")
    _assert_count(comm, "m", "all_reduce", 2 * (P - 1), 2 * (P - 1) * 12 * 8 // P)
    assert_bitwise_equal(own, kept, "the input of all_reduce")


@every_size
def test_gather_and_reduce(ranks: int) -> None:
    run_ranks(gather_and_reduce, ranks)


def all_to_all(rank: int, P: int) -> None:
    comm = Comm(dist.group.WORLD)

    def block(source: int, target: int) -> torch.Tensor:
        # Rank 0 sends nothing to the last rank, and no rank sends to itself more than one row.
        rows = 1 if source == target else 0 if (source, target) == (0, P - 1) else 1 + source + 2 * target
        return _values(10 * source + target, rows, 3)

    wanted = [block(peer, rank) for peer in range(P)]
    received = _twice(comm.all_to_all([block(rank, peer) for peer in range(P)], [x.shape for x in wanted], "x"))
    for peer in range(P):
        assert_bitwise_equal(received[peer], wanted[peer], f"block of {peer}")
    remote = [x.shape[0] for peer, x in enumerate(wanted) if peer != rank]
    _assert_count(comm, "x", "all_to_all", sum(rows > 0 for rows in remote), sum(remote) * 3 * 8)


@every_size
def test_all_to_all(ranks: int) -> None:
    run_ranks(all_to_all, ranks)


def point_to_point(rank: int, P: int) -> None:
    comm = Comm(dist.group.WORLD)
    right, left = (rank + 1) % P, (rank - 1) % P
    for dtype in (torch.float64, torch.float32, torch.complex128):
        if P == 1:
            continue
        # Two to the right and one to the left in one batch: those of one pair of ranks match in order.
        buffers = [torch.empty(2, 3, dtype=dtype), torch.empty(4, dtype=dtype), torch.empty(2, 3, dtype=dtype)]
        handle = comm.exchange(
            [(right, _values(rank, 2, 3, dtype=dtype)), (right, _values(rank, 4, dtype=dtype))]
            + ([(left, _values(rank + 50, 2, 3, dtype=dtype))] if P > 2 else []),
            [(left, buffers[0]), (left, buffers[1])] + ([(right, buffers[2])] if P > 2 else []),
            "p",
        )
        received = _twice(handle)
        assert [x is y for x, y in zip(received, buffers)] == [True] * len(received)
        assert_bitwise_equal(buffers[0], _values(left, 2, 3, dtype=dtype).contiguous(), "first from the left")
        assert_bitwise_equal(buffers[1], _values(left, 4, dtype=dtype), "second from the left")
        if P > 2:
            assert_bitwise_equal(buffers[2], _values(right + 50, 2, 3, dtype=dtype).contiguous(), "from the right")
        _assert_count(comm, "p", "p2p", len(received), sum(x.numel() for x in received) * dtype.itemsize)
    assert comm.exchange([], [], "none").wait() == []


@every_size
def test_point_to_point(ranks: int) -> None:
    run_ranks(point_to_point, ranks)


def tagged(rank: int, P: int) -> list[int]:
    """Messages of one size and two tags, awaited in the other order."""
    comm = Comm(dist.group.WORLD)
    tags = [comm.next_tag(), comm.next_tag()]
    first, second = torch.empty(3), torch.empty(3)
    if rank == 0:
        handles = [comm.exchange([(1, torch.full((3,), float(tag)))], [], "p", tag) for tag in tags]
    else:
        handles = [comm.exchange([], [(0, second)], "p", tags[1]), comm.exchange([], [(0, first)], "p", tags[0])]
    for handle in handles:
        handle.wait()
    if rank == 1:
        assert (first == tags[0]).all() and (second == tags[1]).all()
    assert len(set(tags)) == 2 and 0 not in tags
    return tags


def test_tags_keep_messages_apart() -> None:
    one, other = run_ranks(tagged, 2)
    assert one == other


def broadcast(rank: int, P: int) -> None:
    comm = Comm(dist.group.WORLD)
    for source in range(P):
        for dtype in (torch.float64, torch.complex64):
            value = _values(source, 3, 2, dtype=dtype).contiguous()
            own = value.clone() if rank == source else torch.empty(3, 2, dtype=dtype)
            assert_bitwise_equal(_twice(comm.broadcast(own, source, "b")), value, "broadcast")
            told = int(rank != source)
            _assert_count(comm, "b", "broadcast", told, told * 6 * dtype.itemsize)


@every_size
def test_broadcast(ranks: int) -> None:
    run_ranks(broadcast, ranks)


def sub_group(rank: int, P: int) -> None:
    """Ranks of a group are not those of the world."""
    odd, even = dist.new_group([1, 3]), dist.new_group([2, 0])
    comm = Comm(odd if rank % 2 else even)
    assert (comm.rank, comm.size) == (rank // 2, 2)
    buffer = torch.empty(2)
    comm.exchange([(1 - comm.rank, torch.full((2,), float(rank)))], [(1 - comm.rank, buffer)], "p").wait()
    assert (buffer == (rank + 2) % 4).all()
    assert comm.all_gather(torch.tensor([rank]), "g").wait().tolist() == [[rank % 2], [rank % 2 + 2]]
    assert comm.broadcast(torch.tensor([rank]), 1, "b").wait().tolist() == [rank % 2 + 2]


def test_sub_group() -> None:
    run_ranks(sub_group, 4)


def test_alone_nothing_is_sent() -> None:
    comm, x = Comm(None), torch.arange(6.0).reshape(1, 6)
    assert (comm.rank, comm.size) == (0, 1)
    assert_bitwise_equal(comm.all_gather(x, "g").wait(), x[None], "all_gather")
    assert_bitwise_equal(comm.reduce_scatter(x, "g").wait(), x[0], "reduce_scatter")
    assert_bitwise_equal(comm.all_reduce(x, "g").wait(), x, "all_reduce")
    assert_bitwise_equal(comm.broadcast(x, 0, "g").wait(), x, "broadcast")
    assert_bitwise_equal(comm.all_to_all([x], [x.shape], "g").wait()[0], x, "all_to_all")
    assert not comm.ledger.counts


def test_ledger_adds_up() -> None:
    ledger = Ledger()
    ledger.mark("nobody listens")
    ledger.events = []
    ledger.add("state", "p2p", 2, 10)
    ledger.add("state", "p2p", 1, 5)
    ledger.add("state", "broadcast", 1, 7)
    ledger.add("halo", "all_gather", 3, 100)
    ledger.mark("here")

    def numbers(count: Count) -> tuple[int, int, int]:
        return count.calls, count.messages, count.bytes

    assert numbers(ledger.counts["state", "p2p"]) == (2, 3, 15)
    assert numbers(ledger.total("state")) == (3, 4, 22)
    assert numbers(ledger.total()) == (4, 7, 122)
    assert numbers(ledger.total("none")) == (0, 0, 0)
    assert ledger.events == ["here"]
    ledger.reset()
    assert numbers(ledger.total()) == (0, 0, 0)


DELAY, BANDWIDTH = 0.02, 1e5  # 1000 doubles take 80 ms


def slow_wire(rank: int, P: int) -> list[float]:
    """Seconds that each kind of message took at least, less what it should."""
    comm = Comm(dist.group.WORLD, wire=Wire(DELAY, BANDWIDTH))
    x, spare = torch.full((1000,), float(rank), dtype=torch.float64), []
    blocks = [x[:500]] * P
    for call, size in (
        (lambda: comm.all_gather(x, "g"), 8000 * (P - 1)),
        (lambda: comm.reduce_scatter(x.reshape(P, -1), "g"), 8000 // P * (P - 1)),
        (lambda: comm.all_to_all(blocks, [block.shape for block in blocks], "g"), 4000 * (P - 1)),
        (lambda: comm.broadcast(x, 0, "g"), 8000 if rank else 0),
    ):
        start = time.perf_counter()
        call().wait()
        spare.append(time.perf_counter() - start - (DELAY + size / BANDWIDTH))
    return spare


def test_wire_delays_collectives() -> None:
    assert all(spare >= 0 for found in run_ranks(slow_wire, 2) for spare in found)


def hops(rank: int, P: int) -> tuple[float, float]:
    """A message of two blocks goes through all ranks; the time each rank began and had it whole."""
    comm = Comm(dist.group.WORLD, wire=Wire(DELAY, BANDWIDTH))
    blocks = [torch.full((250,), 7.0, dtype=torch.float64), torch.full((250,), 8.0, dtype=torch.float64)]
    if rank:
        blocks = [torch.empty(250, dtype=torch.float64) for _ in blocks]
        # Posted long before the sender sends.
        receives = [comm.exchange([], [(rank - 1, block)], "p") for block in blocks]
    dist.barrier()
    begin, sends = time.perf_counter(), []
    for k, block in enumerate(blocks):
        if rank:
            receives[k].wait()
        if rank + 1 < P:
            sends.append(comm.exchange([(rank + 1, block)], [], "p"))
    end = time.perf_counter()
    assert blocks[0].eq(7).all() and blocks[1].eq(8).all()
    for handle in sends:
        handle.wait()
    if rank:
        count = comm.ledger.total()
        assert (count.messages, count.bytes) == (2, 4000)  # the emulation's own messages are not counted
    return begin, end


def test_wire_delays_every_hop() -> None:
    """Each hop takes delay + bytes / bandwidth from its sending on, and the blocks of one sender share the wire."""
    found = run_ranks(hops, 3)
    begin = found[0][0]
    block = 2000 / BANDWIDTH
    assert found[1][1] - begin >= DELAY + 2 * block
    assert found[2][1] - begin >= 2 * DELAY + 3 * block
