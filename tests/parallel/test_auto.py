"""`auto`: the least of the cost model, alike on all ranks, and as exact as what it picks."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longhaul.launcher.verify.exactness import compare, make_problem
from longhaul.models.errors import UserError
from longhaul.models.ops.segments import Documents
from longhaul.parallel.comm import Comm
from longhaul.parallel.engine import SequenceParallel
from longhaul.parallel.exchange import cost
from longhaul.parallel.exchange.auto import MEASURED, Auto
from longhaul.parallel.exchange.cost import NO_GAIN, Levels, Workload, best, block_counts, estimate, estimates, hops, workload
from longhaul.parallel.exchange.registry import make_exchange
from longhaul.parallel.layout import SequenceLayout
from longhaul.parallel.network import LABEL, Link, Network
from tests.door.ranks import WIDTH, make_module
from tests.harness import run_ranks

from .test_exchange import Cell, _compare, _start, cells

# Links and local work a token for which each exchange is best somewhere on 4 ranks.
SETTINGS = ((1e-3, 1e9, 0.0), (1e-6, 1e6, 0.0), (1e-3, 1e3, 1.0), (1e-5, 1e7, 1e-4), (1e-2, 1e5, 1e-3))


# The cost model.
def simulate(work: Workload, network: Network, blocks: int) -> float:
    """A chain of messages, event by event, without arithmetic: exposed seconds at its end."""
    size = work.state_bytes / blocks
    hop = network.hop.seconds(size)
    there = [0.0] * blocks  # rank 0 has all blocks at the start
    for rank in range(1, work.hops + 1):
        arrived, free = [], 0.0
        for block in range(blocks):
            if network.forwards:
                # A link takes a block when it is there and the one before has left: by its bytes, or by the work of sending.
                begin = max(there[block], free)
                free = begin + max(size / network.hop.bytes_per_s, network.gap_s)
                arrived.append(begin + hop)
                continue
            if block == 1 or rank > 1:
                free = max(free, work.local_s)  # only the first receive of all is under way beside local work
            free = max(free, there[block]) + hop  # a rank takes one block after the other
            arrived.append(max(free, work.local_s))
        there = arrived
    # What the last rank does for the blocks itself is not hidden.
    return max((blocks - 1) * network.gap_s if network.forwards else 0.0, there[-1] - work.local_s)


@pytest.mark.parametrize("forwards", [True, False], ids=["forwards", "when it waits"])
@pytest.mark.parametrize("local", [0.0, 0.5, 2.0, 3.5, 100.0])
def test_pipeline_against_simulation(local: float, forwards: bool) -> None:
    network = Network.even(8, 1.0, 10.0, forwards)
    for chain, blocks in itertools.product((1, 2, 7), (1, 2, 8)):
        work = Workload(8, chain, 20, width=blocks, local_s=local)
        expected = simulate(work, network, blocks)
        if blocks == 1:
            assert estimate("ring", work, network).seconds == pytest.approx(expected, abs=1e-9)
        found = estimate("all_scan", work, network)
        assert found.blocks in block_counts(blocks)
        assert found.seconds == pytest.approx(simulate(work, network, found.blocks), abs=1e-9)
        # The least number of blocks that is as good as the best.
        enough = (1 + NO_GAIN) * min(simulate(work, network, k) for k in block_counts(blocks)) + 1e-9
        assert found.blocks == min(k for k in block_counts(blocks) if simulate(work, network, k) <= enough)


def test_gathers_and_scans_by_hand() -> None:
    slow = Network(4, Link(1.0, 10.0), Link(1.0, 10.0), Link(2.0, 10.0), Link(0.1, 1e12), forwards=False)
    work = Workload(4, 3, 20, 10, parts=2, local_s=5.0)
    # 3 ranks send 2 maps of 30 bytes: 2 + 18 seconds less 5, then 8 maps.
    assert estimate("all_gather", work, slow).seconds == pytest.approx(15.8)
    # Two steps of 1 + 3 seconds, the first behind local work; each composes twice, offset and linear part.
    assert estimate("log_scan", work, slow).seconds == pytest.approx(4.8)
    # Its end: an all-gather of one state.
    assert estimate("log_scan", work._replace(want_end=True), slow).seconds == pytest.approx(8.8)
    network = replace(slow, forwards=True, gap_s=0.4)
    assert estimate("all_gather", work, network) == estimate("all_gather", work, slow)
    # Both steps and what they compose behind local work; then what entered is applied, and the own map.
    assert estimate("log_scan", work, network).seconds == pytest.approx(2 * 4 + 8 * 0.1 - 5 + 2 * 0.1)
    # Three hops of 1 + 2 seconds and two maps less 5, and the last map.
    assert estimate("ring", work, network).seconds == pytest.approx(9 + 0.2 - 5 + 0.1)
    # Three hops of 1 + 0.5 and two maps; three blocks more, each 0.5 s of a link's time and 0.5 of a rank's.
    scan = work._replace(width=4, local_s=4.0)
    found = estimate("all_scan", scan, network)
    assert found.blocks == 4 and found.seconds == pytest.approx(4.5 + 0.2 + 3 * 0.5 - 4 + 0.1)
    # Local work that hides all that: the last rank still takes block after block.
    assert cost._pipeline(scan._replace(local_s=50.0), network, 4) == pytest.approx(3 * 0.5 + 0.1)
    levels = Levels(Network.even(2, 0.5, 10.0), Network.even(2, 1.0, 10.0))
    # Inside 0.5 + 6 less 5, across one hop of 10 bytes, then its slices: 0.5 + 1.
    found = estimate("hierarchical", work._replace(parts=1, linear_bytes=40), slow, levels)
    assert found.seconds == pytest.approx(1.5 + 2.0 + 1.5)


def test_hops_of_chains() -> None:
    documents = Documents((0, 16))
    contiguous, zigzag = (SequenceLayout.make(name, documents, 4) for name in ("contiguous", "zigzag"))
    cut = Documents((0, 6, 16))  # inside rank 1: what leaves rank 1 waits for nobody
    for reverse in (False, True):
        assert hops(contiguous.chain(documents), reverse) == 3
        assert hops(zigzag.chain(documents), reverse) == 6
        assert hops(contiguous.chain(Documents(range(0, 17, 4))), reverse) == 0
    assert hops(contiguous.chain(cut)) == 2
    assert hops(contiguous.chain(cut), reverse=True) == 2
    assert hops(SequenceLayout.contiguous(16, 4, (8, 0, 8, 0)).chain(documents)) == 1


def test_crossover_is_what_the_docs_print(capsys: pytest.CaptureFixture[str]) -> None:
    cost.main()
    assert capsys.readouterr().out in (Path(__file__).parents[2] / "docs" / "engines.md").read_text()
    lines = list(cost.crossover())
    assert sum(line.startswith("| 25 GB/s") for line in lines) == 3 * len(cost.SIZES)
    names = {cell.split()[0] for line in lines if line.startswith("| ") for cell in line.split("|")[3:-1]}
    assert {"all_gather", "all_scan", "log_scan"} <= names


# The choice.
def _choices(auto: Auto) -> list[Any]:
    return [(key, choice) for key, choice in auto.choices.items()]


def cells_of_auto(rank: int, world_size: int) -> tuple[list[Any], set[str]]:
    """Exact with every setting, and each decision the least of the model."""
    comm, found, names = Comm(dist.group.WORLD), [], set()
    for latency, bandwidth, local in SETTINGS:
        auto = make_exchange("auto", comm, latency_s=latency, bytes_per_s=bandwidth, local_s_per_token=local)
        assert isinstance(auto, Auto) and auto.network == Network.even(world_size, latency, bandwidth)
        for cell in itertools.islice(cells(world_size), 0, None, 29):
            _compare(*_start(auto, cell), cell, "auto")
        for choice in auto.choices.values():
            costs = {name: estimate(name, choice.work, auto.network).seconds for name in choice.estimates}
            assert set(costs) == {"all_gather", "ring", "all_scan", "log_scan"}
            assert costs[choice.name] == min(costs.values())
            names.add(choice.name)
        found.append(_choices(auto))
    assert comm.ledger.total(LABEL).calls == 0  # all was given
    return found, names


@pytest.mark.parametrize("ranks", [2, 3])
def test_exact_and_least_with_given_numbers(ranks: int) -> None:
    results = run_ranks(cells_of_auto, ranks, timeout=120)
    assert all(result == results[0] for result in results)
    assert len(results[0][1]) > 1  # something was chosen


def measured(rank: int, world_size: int) -> tuple[list[Any], str, int]:
    """The same exchange again and again, with nothing given."""
    comm = Comm(dist.group.WORLD)
    auto = make_exchange("auto", comm)
    documents = Documents((0, 24))
    cell = Cell("log_head", SequenceLayout.make("zigzag", documents, world_size), documents, False, False, True, 0)
    for _ in range(MEASURED + 2):
        _compare(*_start(auto, cell), cell, "auto")
    assert isinstance(auto, Auto) and auto.network is not None
    first, last = auto.choices.values()  # before and after local work was known
    assert first.work.local_s == 0 < last.work.local_s
    assert last.name == best(estimates(last.work, auto.network))
    probes = comm.ledger.total(LABEL).calls
    _compare(*_start(auto, cell), cell, "auto")
    assert comm.ledger.total(LABEL).calls == probes  # decided once
    return _choices(auto), auto.describe(), probes


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_agree_on_what_they_measured(ranks: int) -> None:
    results = run_ranks(measured, ranks)
    assert all(result == results[0] for result in results)
    assert "LogScale" in results[0][1] and "exposed ms" in results[0][1]


def two_levels(rank: int, world_size: int) -> list[Any]:
    """Nodes of two: hierarchical is a candidate on chains of ranks in order."""
    nodes = [list(range(start, start + 2)) for start in range(0, world_size, 2)]
    intra, _ = dist.new_subgroups_by_enumeration(nodes)
    inter, _ = dist.new_subgroups_by_enumeration([list(index) for index in zip(*nodes)])
    auto = make_exchange("auto", Comm(dist.group.WORLD), intra=Comm(intra), inter=Comm(inter))
    assert isinstance(auto, Auto)
    documents = Documents((0, 24))
    for name in ("contiguous", "zigzag"):
        cell = Cell("dense", SequenceLayout.make(name, documents, world_size), documents, False, True, False, 0)
        _compare(*_start(auto, cell), cell, "auto")
    contiguous, zigzag = auto.choices.values()
    assert "hierarchical" in contiguous.estimates and "hierarchical" not in zigzag.estimates
    # Whatever was picked: the two levels serve it too.
    exchange = auto._exchange("hierarchical", 2)
    _compare(*_start(exchange, cell._replace(layout=SequenceLayout.make("contiguous", documents, world_size))), cell, "auto")
    return _choices(auto)


def test_two_levels() -> None:
    results = run_ranks(two_levels, 4)
    assert all(result == results[0] for result in results)


def module_exactness(rank: int, world_size: int) -> dict[str, float]:
    """A whole mixer, forward and backward, while local work is measured and after."""
    comm, documents = Comm(dist.group.WORLD), Documents((0, 9, 31), first_position=2)
    engine = SequenceParallel(comm, exchange="auto")
    problem = make_problem(make_module("mamba2"), documents, WIDTH, 1, torch.float64, True)
    worst: dict[str, float] = {}
    for _ in range(MEASURED + 1):
        errors = compare(
            make_module("mamba2"),
            lambda layout, documents, keep: engine.shard(documents, keep_state=keep),
            engine.layout(documents),
            problem,
            comm,
        )
        worst = {name: max(error, worst.get(name, 0.0)) for name, error in errors.items()}
    assert isinstance(engine.exchange, Auto) and len(engine.exchange.choices) == 4
    return worst


def test_a_mixer_is_exact() -> None:
    for errors in run_ranks(module_exactness, 2):
        assert len(errors) > 5
        assert max(errors.values()) < 1e-10, errors


def nothing_crosses(rank: int, world_size: int) -> int:
    comm = Comm(dist.group.WORLD)
    auto = make_exchange("auto", comm)
    documents = Documents((0, 6, 12))
    cell = Cell("log_head", SequenceLayout.contiguous(12, 2), documents, False, False, False, 0)
    _compare(*_start(auto, cell), cell, "auto")
    return comm.ledger.total().calls


def test_nothing_is_probed_if_nothing_crosses() -> None:
    assert run_ranks(nothing_crosses, 2) == [0, 0]


def test_workload_of_maps() -> None:
    documents = Documents((0, 12))
    for kind, state, linear in (("constant", 30, 0), ("log_key", 30, 6), ("dense_complex", 60, 36)):
        cell = Cell(kind, SequenceLayout.make("zigzag", documents, 2), documents, False, False, False, 0)
        maps, chain, _ = cell.inputs()
        work = workload(maps.select([0, 3]), chain, 2, False, True)
        assert work == Workload(2, 2, 8 * state, 8 * linear, parts=2, width=5, want_end=True), kind


def test_options_that_do_not_fit_are_refused() -> None:
    comm = Comm(None)
    for options, message in (
        ({"latency_s": 1e-3}, "latency_s 0.001 and bytes_per_s None"),
        ({"intra": comm}, "one of the groups intra and inter"),
        ({"payload_dtype": "bfloat16"}, "running state"),
    ):
        with pytest.raises(UserError, match=message):
            make_exchange("auto", comm, **options)
