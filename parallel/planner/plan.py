"""`plan`: the best of all candidates, checked, with its time, memory and a lower bound.

Every candidate is a pure function of integers, so the same lengths, cluster and cost model give the same plan on every
rank.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from longhaul.models.errors import UserError
from longhaul.parallel.planner.apart import separate
from longhaul.parallel.planner.bounds import area_bound, pods_bound
from longhaul.parallel.planner.chunk import chunked
from longhaul.parallel.planner.cluster import Cluster
from longhaul.parallel.planner.cost import MICROSECOND, CostModel
from longhaul.parallel.planner.exact import MOST, exact
from longhaul.parallel.planner.pods import LARGEST, deal, pod_blocks, pod_size
from longhaul.parallel.planner.polish import polish
from longhaul.parallel.planner.pour import level, pour, squeeze
from longhaul.parallel.planner.problem import Problem, Shelf, Work, place
from longhaul.parallel.planner.shelf import Search, State
from longhaul.parallel.planner.static import fixed, smallest_degree
from longhaul.parallel.planner.static import floor as static_floor

DEFAULT_BUDGET = 60_000  # placements of a document


@dataclass(frozen=True)
class GroupPlan:
    """Documents that run on a block of ranks as one packed stream.

    Attributes:
        ranks: the block; its length is the degree.
        documents: indices into the caller's lengths, in stream order.
        cuts: `degree + 1` offsets of the stream; rank `r` of the block holds tokens `cuts[r] .. cuts[r + 1]`.
        time: predicted seconds, without the bias.
    """

    ranks: range
    documents: tuple[int, ...]
    cuts: tuple[int, ...]
    time: float

    @property
    def degree(self) -> int:
        return len(self.ranks)

    @property
    def tokens(self) -> int:
        return self.cuts[-1]


@dataclass(frozen=True)
class MicroBatch:
    """Groups that run side by side; `time` is the predicted makespan in seconds, bias included."""

    groups: tuple[GroupPlan, ...]
    time: float


@dataclass(frozen=True)
class Plan:
    """A step.

    Attributes:
        micro_batches: in order of execution.
        time: predicted seconds of the step.
        memory: most bytes on a rank.
        bound: no plan takes fewer seconds (under the cost model).
        candidate: name of the candidate that won.
        candidates: predicted seconds of every candidate that was completed.
        objective: `sum` or `split`.
        work: placements spent.
        idle: share of rank-seconds (biases left out) that ranks wait for a longer group or have none.
        pod_ranks: ranks of a pod, 0 if the cluster was planned as one. Pods do not wait for each other: micro-batch `m`
            holds the groups of every pod's `m`-th micro-batch, and the step takes as long as the slowest pod.
    """

    micro_batches: tuple[MicroBatch, ...]
    time: float
    memory: float
    bound: float
    candidate: str
    candidates: dict[str, float] = field(compare=False)
    objective: str = "sum"
    work: int = 0
    idle: float = 0.0
    pod_ranks: int = 0

    @property
    def gap(self) -> float:
        """How far the plan can be from the best one, at most: 0.05 is five per cent."""
        return self.time / self.bound - 1.0


def realise(problem: Problem, search: Search, state: State, work: Work) -> list[Shelf]:
    """Whole plan of a searched state: light documents poured in, the rest in shelves of its own or squeezed in."""
    shelves, left = pour(problem, search.skeleton(state), search.light, search.rate, work)
    if not left:
        return shelves
    options = []
    tokens = sum(problem.length[i] for i in left)
    kinds = [(problem.single_kind[rank], rank if not problem.even else -1) for rank in range(problem.cluster.ranks)]
    least = -(-tokens // (problem.cluster.ranks * problem.tokens))
    for number in range(least, least + 4):
        own = level(problem, left, number, kinds, work)
        if own is not None:
            options.append(shelves + own)
            if problem.even:  # more micro-batches help only where fast ranks run out of memory
                break
    if shelves and state.extra <= 1 and len(left) <= 64:
        copies = copied(shelves)
        if not squeeze(problem, copies, left, work):
            options.append(copies)
    return min(options, key=problem.total)


def polished(problem: Problem, shelves: list[Shelf], work: Work) -> list[Shelf]:
    """The plan after local search, or as it was if barriers between layers make that longer (the search minds their sum
    only).
    """
    if not problem.parts:
        polish(problem, shelves, work)
        return shelves
    copies = copied(shelves)
    polish(problem, copies, work)
    return min(shelves, copies, key=problem.total)


def copied(shelves: list[Shelf]) -> list[Shelf]:
    """Groups that can be changed without changing the original's."""
    return [[[*group[:3], list(group[3]), group[4]] for group in shelf] for shelf in shelves]


def candidates(problem: Problem, work: Work, longest: int, small: bool = True) -> dict[str, list[Shelf]]:
    """All candidates that can still win, by name; `small`: a step of a few documents is planned exactly instead."""
    found: dict[str, list[Shelf]] = {}

    def best() -> int | None:
        return min((problem.total(shelves) for shelves in found.values()), default=None)

    if small and len(problem.length) <= MOST and problem.even and problem.model.objective == "sum":
        return {"exact": exact(problem, work)}
    documents = list(range(len(problem.length)))
    search = Search(problem, documents, work)
    states = search.run()
    options = []
    for state in states:
        shelves = realise(problem, search, state, work)
        options.append(shelves)
    options.sort(key=problem.total)
    if options:
        found["shelf"] = min((polished(problem, shelves, work) for shelves in options), key=problem.total)
    shelves_or_none = chunked(problem, work, below=best())
    if shelves_or_none:
        found["chunk"] = polished(problem, shelves_or_none, work)
    return static_candidates(problem, work, longest, found, best())


def static_candidates(
    problem: Problem, work: Work, longest: int, found: dict[str, list[Shelf]], least: int | None
) -> dict[str, list[Shelf]]:
    """Add the plans of one degree that can beat `least`: fixed, best single degree, one group of all ranks."""
    chosen = smallest_degree(problem, max(longest, problem.length[0]))
    largest = max(problem.degree)
    for degree in sorted(set(problem.degree), reverse=True):
        if least is not None and static_floor(problem, degree) >= least:
            continue
        shelves_or_none = fixed(problem, degree, work)
        if shelves_or_none:
            name = "one_group" if degree == largest else "fixed" if degree == chosen else "best_single_degree"
            if name not in found or problem.total(shelves_or_none) < problem.total(found[name]):
                found[name] = shelves_or_none
                total = problem.total(shelves_or_none)
                least = total if least is None else min(least, total)
    return found


def finish(problem: Problem, shelves: list[Shelf]) -> tuple[MicroBatch, ...]:
    """Public form of the shelves: blocks placed, documents by the caller's indices, cut points."""
    batches = []
    for shelf in shelves:
        place(problem, shelf)
        groups = []
        for time, tokens, kind, members, first in sorted(shelf, key=lambda group: group[4]):
            entry = problem.kinds[kind]
            documents = tuple(problem.order[i] for i in members)
            groups.append(
                GroupPlan(range(first, first + entry.degree), documents, entry.cuts(tokens), time * MICROSECOND)
            )
        batches.append(MicroBatch(tuple(groups), (problem.bias + problem.shelf_time(shelf)) * MICROSECOND))
    return tuple(batches)


def planned(problem: Problem, found: dict[str, list[Shelf]], work: Work, apart: Collection[int] = ()) -> Plan:
    """The best candidate as a plan; documents of the caller's indices `apart` are in groups of their own."""
    kept_apart = {position for position, index in enumerate(problem.order) if index in apart}
    if len(kept_apart) > 1:
        found = {name: separate(problem, copied(shelves), kept_apart) for name, shelves in found.items()}
    times = {name: problem.total(shelves) for name, shelves in found.items()}
    winner = min(times, key=lambda name: times[name])
    batches = finish(problem, found[winner])
    return Plan(
        batches,
        times[winner] * MICROSECOND,
        problem.model.memory(_most_tokens(batches)),
        area_bound(problem) * MICROSECOND,
        winner,
        {name: time * MICROSECOND for name, time in times.items()},
        problem.model.objective,
        work.done,
        1.0 - _busy(batches) / ((times[winner] - problem.bias * len(batches)) * MICROSECOND * problem.cluster.ranks),
    )


def _busy(batches: tuple[MicroBatch, ...]) -> float:
    return sum(group.time * group.degree for batch in batches for group in batch.groups)


def _most_tokens(batches: tuple[MicroBatch, ...]) -> int:
    return max(
        b - a for batch in batches for group in batch.groups for a, b in zip(group.cuts, group.cuts[1:], strict=False)
    )


def in_pods(problem: Problem, size: int, work: Work, apart: Collection[int] = ()) -> Plan:
    """Every pod plans its own documents; micro-batches of the same number are shown side by side."""
    blocks = pod_blocks(problem.cluster.ranks, size)
    hands = deal(problem, blocks)
    rows: list[list[MicroBatch]] = []
    times, memory, biases = [], 0.0, 0.0
    for block, hand in zip(blocks, hands, strict=True):
        if not hand:
            continue
        part = problem.cluster.part(block.start, len(block))
        kept_apart = {position for position, i in enumerate(hand) if problem.order[i] in apart}
        lengths, budget = [problem.length[i] for i in hand], work.limit // len(blocks)
        own = plan(lengths, part, problem.model, budget, pod_ranks=0, apart=kept_apart)
        work.done += own.work
        times.append(own.time)
        biases += len(own.micro_batches) * problem.bias * MICROSECOND * len(block)
        memory = max(memory, own.memory)
        for number, batch in enumerate(own.micro_batches):
            groups = tuple(
                GroupPlan(
                    range(group.ranks.start + block.start, group.ranks.stop + block.start),
                    tuple(problem.order[hand[i]] for i in group.documents),
                    group.cuts,
                    group.time,
                )
                for group in batch.groups
            )
            if number == len(rows):
                rows.append([])
            rows[number].append(MicroBatch(groups, batch.time))
    batches = tuple(
        MicroBatch(tuple(group for batch in row for group in batch.groups), max(batch.time for batch in row))
        for row in rows
    )
    bound = pods_bound(problem, blocks) * MICROSECOND
    time = max(times)
    idle = 1.0 - _busy(batches) / (time * problem.cluster.ranks - biases)
    return Plan(batches, time, memory, bound, "pods", {"pods": time}, problem.model.objective, work.done, idle, size)


def plan(
    lengths: Sequence[int],
    cluster: Cluster,
    cost_model: CostModel,
    budget: int = DEFAULT_BUDGET,
    max_length: int = 0,
    pod_ranks: int | None = None,
    apart: Collection[int] = (),
) -> Plan:
    """Plan one step. Pure and deterministic.

    Args:
        lengths: tokens of each document.
        cluster: ranks, memory, links.
        cost_model: predicted time and memory.
        budget: work limit in placements of a document; the best candidate found within it is returned.
        max_length: longest document the job may meet (what a fixed degree must hold); 0: the longest of this step.
        pod_ranks: ranks of a pod; None: pods above 128 ranks; 0: one cluster, as a barrier across all ranks requires.
        apart: documents of which a group holds at most one: those that began in an earlier stream.
    """
    apart = frozenset(apart)
    problem = Problem(lengths, cluster, cost_model)
    size = pod_ranks
    if size is None:
        size = pod_size(problem) if cluster.ranks > LARGEST else 0
    if not 0 < size < cluster.ranks:
        work = Work(budget)
        return planned(problem, candidates(problem, work, max_length), work, apart)
    if size & (size - 1):
        raise UserError(f"A pod of {size} ranks is not aligned: use a power of two.")
    work = Work(budget * len(pod_blocks(cluster.ranks, size)))
    best = in_pods(problem, size, work, apart)
    while pod_ranks is None and 2 * size < cluster.ranks:  # larger pods help when a few long documents bind
        size *= 2
        larger = in_pods(problem, size, work, apart)
        if larger.time >= best.time:
            break
        best = larger
    still = static_candidates(problem, work, max_length, {}, round(best.time / MICROSECOND))
    if still:
        other = planned(problem, still, work, apart)
        times = {**best.candidates, **other.candidates}
        best = replace(other if other.time < best.time else best, candidates=times, bound=best.bound, work=work.done)
    return best
