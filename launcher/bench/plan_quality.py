"""How good plans are: gap to lower bounds, gain over fixed degrees, work of the planner. Writes the tables of
docs/planner.md.

    python -m longhaul.launcher.bench.plan_quality [--batches 16] [--tables step mix uneven milp pods small]

Everything here is the cost model's prediction (published 7B constants), nothing is run. Times of the planner are CPU
seconds of one core (`time.process_time`), because other work may share the machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from longhaul.parallel.planner import Cluster, CostModel, Link, Plan, plan, published
from longhaul.parallel.planner.aggregated import aggregated_bound
from longhaul.parallel.planner.bounds import area_bound, configuration_bound
from longhaul.parallel.planner.chunk import cut, dual
from longhaul.parallel.planner.cost import MICROSECOND, PUBLISHED_ALL_TO_ALL
from longhaul.parallel.planner.exact import exact
from longhaul.parallel.planner.milp import milp, solver_name
from longhaul.parallel.planner.plan import candidates
from longhaul.parallel.planner.problem import Problem, Work
from longhaul.parallel.planner.static import fixed, smallest_degree

CAPS = {"192K": 192 * 1024, "384K": 384 * 1024}
UNLIMITED = 1 << 60


def lengths_of(seed: int, cap: int, documents: int = 512) -> list[int]:
    """Synthetic lengths: 92 % lognormal (median 1.8 K, sigma 1), 8 % Pareto (from 8 K, alpha 1.2), rejected above the
    cap.
    """
    random = np.random.default_rng(seed)
    found: list[int] = []
    while len(found) < documents:
        if random.random() < 0.92:
            length = int(1800 * np.exp(random.standard_normal()))
        else:
            length = int(8192 * random.random() ** (-1 / 1.2))
        if 1 <= length <= cap:
            found.append(length)
    return found


def cluster_of(ranks: int = 64, speeds: tuple[float, ...] = ()) -> Cluster:
    """Nodes of 8 ranks with 30 GB each: states travel at 100 GB/s inside a node and 20 GB/s outside, all-to-all as
    published.
    """
    links = (Link(8, 100e9, 1e-5), Link(ranks, 20e9, 2e-5))
    return Cluster(ranks, 30e9, links, PUBLISHED_ALL_TO_ALL, speeds)


def batches(count: int) -> Iterator[tuple[str, int, list[int]]]:
    """Name of the cap, the cap, and lengths; half of the batches a cap, no two alike."""
    for seed in range(count):
        name = list(CAPS)[seed % 2]
        yield name, CAPS[name], lengths_of(seed, CAPS[name])


def statics(problem: Problem, cap: int) -> tuple[float, float]:
    """Seconds of the smallest degree that holds the cap, and of the best single degree."""
    times = {}
    for degree in sorted(set(problem.degree)):
        shelves = fixed(problem, degree, Work(UNLIMITED))
        if shelves:
            times[degree] = problem.total(shelves) * MICROSECOND
    return times[smallest_degree(problem, cap)], min(times.values())


def timed(make: Callable[[], Plan]) -> tuple[Plan, float]:
    """A plan and the CPU milliseconds it took."""
    start = time.process_time()
    made = make()
    return made, (time.process_time() - start) * 1e3


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table."""
    print(f"\n**{title}**\n")
    for line in chain((columns, ["---"] * len(columns)), rows):
        print("| " + " | ".join(line) + " |", flush=True)


def mean_worst(values: Sequence[float]) -> str:
    return f"{np.mean(values):.1%} / {max(values):.1%}"


def spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def step_table(count: int) -> None:
    """The prototype's settings."""
    found: dict[str, list[tuple[float, ...]]] = {}
    cluster, model = cluster_of(), published()
    steps = list(batches(count))
    # Plans first, bounds later: the solver would leave the planner cold caches, which a training loop does not.
    plans = [timed(lambda: plan(lengths, cluster, model, max_length=cap)) for _, cap, lengths in steps]  # noqa: B023
    for (name, cap, lengths), (made, cpu) in zip(steps, plans, strict=True):
        problem = Problem(lengths, cluster, model)
        start = time.process_time()
        bound = configuration_bound(problem, round(made.time / MICROSECOND)) * MICROSECOND
        spent = time.process_time() - start
        one, best = statics(problem, cap)
        old = made.time / (area_bound(problem) * MICROSECOND) - 1
        row = (one / made.time, best / made.time, old, made.time / bound - 1, cpu, spent, made.idle)
        for key in (name, "all"):
            found.setdefault(key, []).append(row)
    rows = []
    for name, values in found.items():
        a = list(zip(*values, strict=True))
        cells = [name, str(len(values)), spread(a[0]), spread(a[1]), mean_worst(a[2]), mean_worst(a[3])]
        rows.append([*cells, f"{np.mean(a[4]):.0f} / {max(a[4]):.0f}", f"{np.mean(a[5]):.1f}", f"{np.mean(a[6]):.1%}"])
    show(
        "64 ranks, 512 documents, softmax, 7B",
        ("cap", "batches", "fixed / planned", "best single / planned", "gap to area bound, mean / worst",
         "gap to configuration bound, mean / worst", "planner CPU ms, mean / worst", "bound CPU s", "idle"),
        rows,
    )  # fmt: skip


def mix_table(count: int) -> None:
    """Layer mixes by engine, both objectives."""
    columns = (
        *("layers", "engine of linear layers", "objective", "planned s", "fixed / planned", "best single / planned"),
        *("gap to area bound", "gap to configuration bound", "CPU ms", "won by"),
    )
    show(f"Layer mixes, 64 ranks, 512 documents, cap 384K, {count} batches (means)", columns, mix_rows(count))


def mix_rows(count: int) -> Iterator[list[str]]:
    """A row a mix, engine and objective."""
    for share, name in ((1.0, "softmax"), (0.25, "hybrid 1/4"), (0.125, "hybrid 1/8"), (0.0, "linear")):
        for engine in ("head_split",) if share == 1.0 else ("head_split", "all_gather", "scan"):
            for objective in ("sum",) if share in (0.0, 1.0) else ("sum", "split"):
                model = published(softmax=share, engine=engine, objective=objective)
                yield [name, engine, objective, *mix_row(count, model)]


def mix_row(count: int, model: CostModel) -> list[str]:
    cluster, cap, values, winners = cluster_of(), CAPS["384K"], [], []
    steps = [lengths_of(1000 + seed, cap) for seed in range(count)]
    plans = [timed(lambda: plan(lengths, cluster, model, max_length=cap)) for lengths in steps]  # noqa: B023
    for lengths, (made, cpu) in zip(steps, plans, strict=True):
        problem = Problem(lengths, cluster, model)
        whole = round(made.time / MICROSECOND)
        bound = configuration_bound(problem, whole, classes=14, singles=40, buckets=6) * MICROSECOND
        one, best = statics(problem, cap)
        values.append((made.time, one / made.time, best / made.time, made.gap, made.time / bound - 1, cpu))
        winners.append(made.candidate)
    a = [float(np.mean(column)) for column in zip(*values, strict=True)]
    won = ", ".join(f"{name} {winners.count(name)}" for name in dict.fromkeys(winners))
    return [f"{a[0]:.1f}", f"{a[1]:.2f}", f"{a[2]:.2f}", f"{a[3]:.1%}", f"{a[4]:.1%}", f"{a[5]:.0f}", won]


def executed(made: Plan, lengths: Sequence[int], cluster: Cluster, model: CostModel) -> float:
    """Seconds of a plan made for even ranks on a cluster that is not: equal shards, so a group is as fast as its
    slowest rank.
    """
    problem = Problem(lengths, replace(cluster, speeds=()), model)
    rank_of = {index: i for i, index in enumerate(problem.order)}
    total = 0.0
    for batch in made.micro_batches:
        longest = 0.0
        for group in batch.groups:
            slowest = min(cluster.speed(rank) for rank in group.ranks) / 1000
            kind = problem.kinds[problem.degree.index(group.degree)]
            slow = replace(kind, slowdown=kind.slowdown / slowest)
            documents = np.asarray([problem.length[rank_of[i]] for i in group.documents], np.int64)
            busy = model.document_time(documents, cluster, slow, model.layers).sum() + model.group_time(
                cluster, slow, model.layers
            )
            longest = max(longest, float(busy))
        total += longest + problem.bias
    return total * MICROSECOND


def uneven_table(count: int) -> None:
    """Slow nodes: the planner told and not told."""
    cases = {
        "1 of 8 nodes at 0.8": (0.8,) * 8 + (1.0,) * 56,
        "1 of 8 nodes at 0.6": (0.6,) * 8 + (1.0,) * 56,
        "half at 0.5": (0.5,) * 32 + (1.0,) * 32,
        "half at 0.33": (0.33,) * 32 + (1.0,) * 32,
        "one slow rank a node, 0.7": ((0.7,) + (1.0,) * 7) * 8,
    }
    rows = []
    for name, speeds in cases.items():
        for share, engine in ((1.0, "head_split"), (0.125, "scan")):
            model, cluster, cap, values = (
                published(softmax=share, engine=engine),
                cluster_of(64, speeds),
                CAPS["384K"],
                [],
            )
            for seed in range(count):
                lengths = lengths_of(2000 + seed, cap)
                made, cpu = timed(lambda: plan(lengths, cluster, model, max_length=cap))  # noqa: B023
                unaware = executed(plan(lengths, cluster_of(), model), lengths, cluster, model)
                problem = Problem(lengths, cluster, model)
                one, _ = statics(problem, cap)
                whole = round(made.time / MICROSECOND)
                bound = configuration_bound(problem, whole, classes=14, singles=40, buckets=6) * MICROSECOND
                values.append((made.time, unaware / made.time, one / made.time, made.gap, made.time / bound - 1, cpu))
            a = [float(np.mean(column)) for column in zip(*values, strict=True)]
            layers = "softmax" if share == 1.0 else "hybrid 1/8, scan"
            rows.append(
                [name, layers, f"{a[0]:.1f}", f"{a[1]:.2f}", f"{a[2]:.2f}", f"{a[3]:.1%}", f"{a[4]:.1%}", f"{a[5]:.0f}"]
            )
    columns = (
        *("speeds", "layers", "planned s", "unaware / planned", "fixed / planned", "gap to area bound"),
        *("gap to configuration bound", "CPU ms"),
    )
    show(f"Uneven nodes, 64 ranks, cap 384K, {count} batches (means)", columns, rows)


def milp_table(nodes: int) -> None:
    """One micro-batch of a sort-and-cut step: bisection against the published program."""
    columns = (
        *("documents", "bisection ms", "its CPU ms", "gap to aggregated bound", "bound CPU s"),
        *("MILP, degree >= 8", "its bound", "CPU s", "MILP, all degrees", "its bound", "CPU s"),
    )
    title = f"One micro-batch against the published program ({solver_name()}, 16 buckets, {nodes} nodes"
    show(f"{title}, {nodes // 10} for all degrees; times relative to bisection)", columns, milp_rows(nodes))


def milp_rows(nodes: int) -> Iterator[list[str]]:
    """A row a micro-batch, as it is solved: minutes each."""
    problem = Problem(lengths_of(3, CAPS["384K"]), cluster_of(), published())
    for start, end in cut(problem.length, problem.shelves + 1):
        documents = list(range(start, end))
        begin = time.process_time()
        filled = dual(problem, documents, Work(UNLIMITED))
        cpu = time.process_time() - begin
        if filled is None:
            continue
        cells = [f"{len(documents)}, longest {problem.length[start]}", f"{filled.time / 1e3:.0f}", f"{cpu * 1e3:.1f}"]
        begin = time.process_time()
        bound = aggregated_bound(problem, documents)
        cells += [f"{filled.time / bound - 1:+.1%}", f"{time.process_time() - begin:.1f}"]
        for least, limit in ((8, nodes), (1, nodes // 10)):
            begin = time.process_time()
            found = milp(problem, documents, nodes=limit, least_degree=least, warm=[filled.groups])
            took = time.process_time() - begin
            gap = "none" if found.shelves is None else f"{(found.time - problem.bias) / filled.time - 1:+.1%}"
            proved = max(0.0, found.bound - problem.bias) / filled.time
            cells += [f"{gap}{' (optimal)' if found.optimal else ''}", f"{proved:.0%}", f"{took:.1f}"]
        yield cells


def small_table(count: int) -> None:
    """Steps small enough for the optimum."""
    gaps, bounds, old = [], [], []
    model = published()
    cluster = Cluster(8, 30e9, (Link(4, 100e9), Link(8, 20e9)), {2: 119.5e9, 4: 104.1e9, 8: 10.3e9})
    for seed in range(count):
        lengths = [min(length * 3, 50_000) for length in lengths_of(3000 + seed, 50_000, 7)]
        problem = Problem(lengths, cluster, model)
        best = problem.total(exact(problem, Work(UNLIMITED)))
        found = candidates(problem, Work(60_000), 0, small=False)
        gaps.append(min(map(problem.total, found.values())) / best - 1)
        bounds.append(1 - configuration_bound(problem, best + 1) / best)
        old.append(1 - area_bound(problem) / best)
    rows = [[str(count), mean_worst(gaps), f"{sum(gap < 1e-9 for gap in gaps)}", mean_worst(bounds), mean_worst(old)]]
    columns = (
        "steps",
        "heuristics above optimum",
        "steps solved exactly",
        "configuration bound below optimum",
        "area bound below optimum",
    )
    show("7 documents on 8 ranks, optimum by dynamic programming (mean / worst)", columns, rows)


def pods_table() -> None:
    """Large clusters."""
    rows = []
    model = published()
    for ranks, documents in ((128, 1024), (256, 2048), (1024, 2048), (1024, 8192)):
        cluster, cap = cluster_of(ranks), CAPS["384K"]
        lengths = lengths_of(4000 + ranks, cap, documents)
        made, cpu = timed(lambda: plan(lengths, cluster, model, max_length=cap))  # noqa: B023
        problem = Problem(lengths, cluster, model)
        one = fixed(problem, 64, Work(UNLIMITED))
        assert one is not None
        fixed_time = problem.total(one) * MICROSECOND
        pods = ranks // made.pod_ranks if made.pod_ranks else 1
        name = f"{pods} of {made.pod_ranks}" if made.pod_ranks else "one"
        rows.append(
            [
                str(ranks),
                str(documents),
                name,
                f"{made.time:.1f}",
                f"{fixed_time / made.time:.2f}",
                f"{made.gap:.1%}",
                f"{cpu:.0f}",
            ]
        )
    columns = (
        "ranks",
        "documents",
        "pods",
        "planned s",
        "fixed(64) / planned",
        "gap to bound",
        "CPU ms, all pods in one process",
    )
    show("Large clusters, cap 384K, one batch a row", columns, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    tables = ("step", "mix", "uneven", "milp", "pods", "small")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=16, help="batches of the main table (the others take a quarter)")
    parser.add_argument("--nodes", type=int, default=200, help="node limit of the mixed-integer programs")
    parser.add_argument("--tables", nargs="*", choices=tables, default=list(tables))
    chosen = parser.parse_args(arguments)
    few = max(1, chosen.batches // 4)
    makers: dict[str, Callable[[], None]] = {
        "step": lambda: step_table(chosen.batches),
        "mix": lambda: mix_table(few),
        "uneven": lambda: uneven_table(few),
        "milp": lambda: milp_table(chosen.nodes),
        "pods": pods_table,
        "small": lambda: small_table(2 * chosen.batches),
    }
    for name in chosen.tables:
        makers[name]()


if __name__ == "__main__":
    main()
