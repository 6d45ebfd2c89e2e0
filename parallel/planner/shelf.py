"""The joint shelf planner: form micro-batches and groups together, longest documents first.

A micro-batch is a shelf of a height (its makespan); planning a step is packing shelves. A beam of partial plans is
extended one shelf at a time: the longest document left seeds the shelf, several heights are tried, each filled with the
documents that fit. *Heavy* documents are placed one by one; *light* ones (they fit one rank, and there are hundreds)
are a fluid during the search, poured into the shelves that won afterwards. A partial plan is worth its time plus a
bound on the time of what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longhaul.parallel.planner.fill import TIGHT, Filled, fill
from longhaul.parallel.planner.problem import Problem, Shelf, Work

# Heights tried, times the least: beams over two grids find better plans than a wider beam over one.
BEAMS = (
    (3, (1.0, 1.07, 1.14, 1.22, 1.32, 1.45, 1.7, 2.0)),
    (2, (1.0, 1.04, 1.1, 1.18, 1.27, 1.38, 1.55, 1.85, 2.3)),
)
ETA = 1.08  # what is left is taken to cost this many times its least area
SEEDS = 3
TALLEST = 4.0
POURED = 0.97  # share of a fluid's room that whole documents fill


@dataclass
class State:
    """A partial plan: time so far, heavy documents left, light tokens poured, area and tokens left, and how it came."""

    cost: int
    left: list[int]
    poured: float
    area: int
    tokens: int
    parent: State | None = None
    shelf: Filled | None = None
    height: int = 0
    extra: int = 0


class Search:
    """Beam search over shelves.

    Args:
        problem: the step's problem.
        documents: positions to plan, by falling length.
        work: counts the placements.
    """

    def __init__(self, problem: Problem, documents: Sequence[int], work: Work) -> None:
        self.problem, self.work = problem, work
        ranks = problem.cluster.ranks
        area = sum(problem.area[i] for i in documents)
        tokens = sum(problem.length[i] for i in documents)
        self.least_shelves = max(1, -(-tokens // (ranks * problem.tokens)))
        mean = area // problem.power // self.least_shelves
        single = 0
        light = [i for i in documents if problem.time[i][single] + problem.start[single] <= 0.75 * mean]
        self.light = light
        self.heavy = list(documents[: len(documents) - len(light)])
        self.light_tokens = sum(problem.length[i] for i in light)
        weight = max(1, self.light_tokens)
        self.rate = [
            sum(min(problem.time[i][k], 1 << 40) for i in light) / weight for k in range(len(problem.kinds))
        ]  # microseconds a light token takes in a group of each kind
        rate = sum(problem.area[i] for i in light) / weight
        self.light_rate = rate / problem.power  # microseconds of the whole cluster
        self.full = 0.985 * ranks * problem.tokens
        self.natural = min(self.full * self.light_rate, float(mean)) if light else float(mean)

    def room(self, filled: Filled, height: int) -> float:
        """Light tokens that still fit into a shelf of this height."""
        problem, rate = self.problem, self.rate
        if not self.light_tokens:
            return 0.0
        if filled.singles is None:
            room = filled.free * min(problem.tokens, (height - problem.start[0]) / rate[0])
        else:
            kinds = [problem.single_kind[rank] for rank in filled.singles]
            room = sum(min(problem.tokens, height / rate[kind]) for kind in kinds)
        for time, tokens, kind, _, _ in filled.groups:
            by_time, by_memory = (height - time) / rate[kind], problem.capacity[kind] - tokens
            room += by_time if by_time < by_memory else by_memory
        return POURED * room

    def finish(self, state: State) -> tuple[float, int]:
        """Time of a plan whose heavy documents are placed, and the number of shelves of light documents it needs."""
        rest = self.light_tokens - state.poured
        if rest <= 0:
            return float(state.cost), 0
        shelves = -int(-rest // self.full)
        return state.cost + shelves * self.problem.bias + 1.02 * rest * self.light_rate, shelves

    def run(self, keep: int = 2) -> list[State]:
        """Complete states of all beams, best first, with the number of `extra` shelves of light documents."""
        found = [item for width, grid in BEAMS for item in self.beam(width, grid)]
        return [state for _, state in sorted(found, key=lambda item: item[0])[:keep]]

    def beam(self, width: int, grid: Sequence[float]) -> list[tuple[float, State]]:
        """One beam: complete states with their times, heights on the given grid."""
        problem, work = self.problem, self.work
        bias, power = problem.bias, problem.power
        capacity = problem.cluster.ranks * problem.tokens
        heavy_area = sum(problem.area[i] for i in self.heavy)
        states = [State(0, self.heavy, 0.0, heavy_area, sum(problem.length[i] for i in self.heavy))]
        complete: list[tuple[float, State]] = []
        while states:
            found: dict[tuple[int, ...], tuple[float, int, State]] = {}
            for state in states:
                if not state.left:
                    time, state.extra = self.finish(state)
                    complete.append((time, state))
                    continue
                if complete and work.spent:
                    continue
                for filled, height in self.shelves(state, grid):
                    placed_area = sum(problem.area[i] for group in filled.groups for i in group[3])
                    placed_tokens = sum(group[1] for group in filled.groups)
                    poured = min(float(self.light_tokens), state.poured + self.room(filled, height))
                    rest = self.light_tokens - poured
                    area, tokens = state.area - placed_area, state.tokens - placed_tokens
                    cost = state.cost + bias + height
                    score = cost + ETA * area / power + rest * self.light_rate
                    if tokens + rest > 0:
                        score += 0.99 * bias * max(1.0, (tokens + rest) / capacity)
                    key = tuple(filled.left)
                    if key not in found or score < found[key][0]:
                        entry = State(cost, filled.left, poured, area, tokens, state, filled, height)
                        found[key] = (score, len(found), entry)
            ranked = sorted(found.values(), key=lambda item: item[:2])
            if work.spent:
                ranked = ranked[:1]
            states = [item[2] for item in ranked[:width]]
        return complete

    def shelves(self, state: State, grid: Sequence[float]) -> list[tuple[Filled, int]]:
        """Shelves that may follow a state."""
        problem = self.problem
        seed = state.left[0]
        lowest = problem.least[seed]
        base = max(lowest, int(0.92 * self.natural))
        heights = {time + problem.start[k] for i in state.left[:SEEDS] for k, time in enumerate(problem.time[i])}
        heights = {height for height in heights if base <= height <= TALLEST * base}
        heights.update(int(base * factor) for factor in grid)
        if self.work.spent:  # go on greedily
            heights = set(sorted(heights)[::6])
        found: dict[tuple[int, int], tuple[Filled, int]] = {}
        for height in sorted(heights):
            loose = fill(problem, state.left, height, self.work)
            options = [loose, fill(problem, state.left, height, self.work, TIGHT)] if loose.loose else [loose]
            for filled in options:
                key = (filled.time, len(filled.left))
                if key in found:
                    continue
                found[key] = (filled, filled.time)
                if filled.time < 0.98 * height and self.light_tokens:
                    found[(height, -len(filled.left))] = (filled, height)
        return list(found.values())

    def skeleton(self, state: State) -> list[tuple[Filled, int]]:
        """Shelves of a complete state with their heights, groups copied."""
        shelves = []
        step: State | None = state
        while step is not None and step.shelf is not None:
            groups: Shelf = [[*group[:3], list(group[3]), group[4]] for group in step.shelf.groups]
            singles = None if step.shelf.singles is None else list(step.shelf.singles)
            shelves.append((Filled(groups, [], step.shelf.free, singles, step.shelf.time), step.height))
            step = step.parent
        return shelves[::-1]
