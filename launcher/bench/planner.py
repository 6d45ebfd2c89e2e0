"""`longhaul bench planner`: steps of long-tailed documents on a few ranks, planned and of one degree, side by side.

The documents are the sources of Python, at the length scale of a BPE (bytes / 3.6), rounded up to a grid of four lengths an
octave. Every kernel is timed here, alone, at the lengths that ranks will hold. More ranks than cores cannot compute side by
side, so each rank *sleeps* for those times, never for the fitted model's; groups, exchanges of states and all-to-alls are
real, on an emulated wire. Sleeps and wire are stretched or shortened by one factor, the same for all contestants, so that what
this machine itself takes for a micro-batch of so many ranks is a small share; that share is measured apart. The planner knows
half of the lengths, through `longhaul plan calibrate`'s fit; the others are held out. The first step is not counted: after
it the planner also knows, as in training, what micro-batches took.

The wire is as fast beside this machine's kernels as the published cluster's links are beside its GPUs: an all-to-all across
nodes takes 2.2 times the linear work of a layer, inside a node 0.11 times. The wider the model, the longer are the documents
whose quadratic work is as much as their linear work (36 thousand tokens in the published one); the result says which.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from longhaul.launcher.config import TrainConfig
from longhaul.launcher.metrics.hardware import device_name
from longhaul.launcher.plan.calibrate import Calibration, fit, profile
from longhaul.launcher.plan.census import DENSE, ModelFacts, facts_of
from longhaul.launcher.plan.costs import Constants, cost_model
from longhaul.models.config import ModelConfig
from longhaul.models.errors import UserError
from longhaul.parallel.planner import Cluster, CostModel, Link, MicroBatch, Plan, plan
from longhaul.parallel.planner.calibrate import Sample
from longhaul.parallel.planner.learn import Learner
from longhaul.parallel.planner.plan import planned
from longhaul.parallel.planner.problem import Problem, Work
from longhaul.parallel.planner.static import fixed

from .planner_kernels import Budget, KernelClock, KernelTimes, grid, lengths_of
from .planner_ranks import HEAD, Job, Links, Shape, measure
from .ranks import run_on_ranks

ACROSS, INSIDE = 2.2, 0.11  # all-to-all over linear work, of the published cluster beyond a node and inside
UNLIMITED = 1 << 60
PLANNED = "planned"
START = 30.0  # seconds that so many processes may take to begin


def static_plan(lengths: Sequence[int], cluster: Cluster, model: CostModel, degree: int) -> Plan | None:
    """The step on groups of one degree; None if a document does not fit."""
    problem, work = Problem(lengths, cluster, model), Work(UNLIMITED)
    shelves = fixed(problem, degree, work)
    return None if shelves is None else planned(problem, {f"degree {degree}": shelves}, work)


def job_of(
    name: str,
    plans: Sequence[Plan],
    steps: Sequence[Sequence[int]],
    times: Mapping[tuple[str, int, int], float],
    overhead: dict[str, float],
) -> Job:
    """A contestant's sleeps: of each group, the sum over its documents of measured times, and one call's overhead."""
    seconds = tuple(
        tuple(
            tuple(
                {
                    letter: once + sum(times[letter, lengths[index], group.degree] for index in group.documents)
                    for letter, once in overhead.items()
                }
                for group in batch.groups
            )
            for batch in made.micro_batches
        )
        for made, lengths in zip(plans, steps, strict=True)
    )
    return Job(name, tuple(plans), seconds)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Every pattern: calibrate, plan, run."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    budget = Budget(options.minutes, lambda text: print(text, file=sys.stderr, flush=True))
    steps = lengths_of(options.steps, options.documents, options.longest, options.seed)
    shapes = [Shape(pattern * (options.layers // len(pattern)), options.heads, options.width) for pattern in options.patterns]
    letters = "".join(dict.fromkeys("".join(options.patterns)))
    config = _config(letters, options)
    facts, lengths = facts_of(config.model), grid(options.longest)
    least = [length for length in _shares(lengths, options.ranks) if length not in lengths]
    clock = KernelClock(budget, options.repeats)
    others = [1, *least, *lengths[1::2]]
    seen = profile(config, facts, clock, torch.device("cpu"), lengths[::2], others, UNLIMITED, options.repeats)
    letter_of = {layer.mixer: layer.letter for layer in facts.layers} | {HEAD: HEAD}
    overhead = {letter_of[each.mixer]: each.seconds for each in seen if each.tokens == 1}
    times = KernelTimes(config, seen, letter_of, overhead, clock)
    fitted = fit(facts, [each for each in seen if each.tokens in lengths])
    a_token = times.linear_work()
    bytes_a_token = 2 * 4 * 4 * options.width
    inside, across = (bytes_a_token / (share * a_token) for share in (INSIDE, ACROSS))
    links = Links(options.node, options.delay * 1e-3, inside, across)
    rows = [_Pattern(shape, fitted, times, links, budget, options).run(steps) for shape in shapes]
    return {
        "rows": rows, "errors": fitted.errors, "device": device_name(torch.device("cpu")), "inside": links.inside,
        "across": links.across, "crossover": _crossover(facts, fitted), "tokens": [sum(step) for step in steps[1:]],
        "longest": max(lengths), "seconds": budget.spent,
    }  # fmt: skip


def _crossover(facts: ModelFacts, fitted: Calibration) -> float | None:
    """Tokens of a document whose quadratic work is as much as its linear work, in a softmax layer; None without one."""
    for layer in facts.layers:
        rate = fitted.rates[layer.mixer]
        if rate.quadratic:
            return rate.linear * layer.linear / (rate.quadratic * layer.quadratic)
    return None


class _Pattern:
    """The contest on one pattern of layers."""

    def __init__(
        self, shape: Shape, fitted: Calibration, times: KernelTimes, links: Links, budget: Budget, options: argparse.Namespace
    ) -> None:
        self.shape, self.times, self.links, self.budget, self.options = shape, times, links, budget, options
        config, ranks = _config(shape.layers, options), options.ranks
        constants = Constants("measured", fitted.rates)
        engines = {"linear_engine": "all_gather", "softmax_engine": "head_split"}
        model = cost_model(facts_of(config.model), config, constants, ranks, **engines)
        # The kernels that are slept have no model states; memory is what --memory-tokens says.
        self.overhead = {letter: times.overhead[letter] for letter in dict.fromkeys((*shape.layers, HEAD))}
        self.model = replace(model, fixed_bytes=0.0, bias=max(model.bias, sum(_layers(shape, self.overhead))))
        levels = (Link(links.node, links.inside, links.delay), Link(ranks, links.across, links.delay))
        memory = (options.memory_tokens + 0.5) * self.model.bytes_per_token
        carried = {}
        for size in (1 << power for power in range(1, ranks.bit_length())):  # a rank's own part does not travel
            carried[size] = (links.inside if size <= links.node else links.across) * size / (size - 1)
        self.cluster = Cluster(ranks, memory, levels if links.node < ranks else levels[:1], carried)

    def run(self, steps: Sequence[Sequence[int]]) -> dict[str, Any]:
        # The first step is planned with what the kernels say; its micro-batches teach the rest what a micro-batch costs here.
        first = self._contest(steps[:1], self.model)
        learner = Learner(self.model, self.cluster)
        for found in first.values():
            made, seconds = found["plans"][0], found["batches"][0]
            pairs = zip(made.micro_batches, seconds, strict=True)
            learner = learner.update([_slowest(batch, steps[0], time) for batch, time in pairs])
        then = self._contest(steps[1:], learner.model)
        row = {"layers": self.shape.layers, "first error": first[PLANNED]["error"], "slow": self.links.slow}
        row["bound"] = [made.bound for made in then[PLANNED]["plans"]]
        hidden = ("plans", "batches")
        row["contestants"] = {name: {k: v for k, v in each.items() if k not in hidden} for name, each in then.items()}
        return row

    def _contest(self, steps: Sequence[Sequence[int]], model: CostModel) -> dict[str, dict[str, Any]]:
        """The planned steps, and those of every degree that holds all documents; what they took and should have taken."""
        contestants = {PLANNED: [plan(lengths, self.cluster, model, pod_ranks=0) for lengths in steps]}
        for degree in self.cluster.degrees:
            plans = [static_plan(lengths, self.cluster, model, degree) for lengths in steps]
            found = [each for each in plans if each is not None]
            if len(found) == len(plans):
                contestants[f"degree {degree}"] = found
        jobs = [job_of(name, plans, steps, self.times, self.overhead) for name, plans in contestants.items()]
        planned_steps = contestants[PLANNED]
        a_batch = sum(made.time for made in planned_steps) / sum(len(made.micro_batches) for made in planned_steps)
        self.links = replace(self.links, slow=self.options.pace / a_batch)
        batches = sum(len(made.micro_batches) for job in jobs for made in job.plans)
        expected = sum(made.time for job in jobs for made in job.plans) * self.links.slow + 0.5 * batches + START
        self.budget.take(expected, f"{self.shape.layers}, {len(steps)} steps of {len(jobs)} contestants")
        seen = run_on_ranks(measure, self.options.ranks, 1, self.shape, self.links, "all_gather", jobs, True)
        return {job.name: self._result(job, [rank[job.name] for rank in seen]) for job in jobs}

    def _result(self, job: Job, seen: Sequence[dict[str, list[list[float]]]]) -> dict[str, Any]:
        batches, machine = (
            [[max(batch) for batch in zip(*(rank[kind][step] for rank in seen))] for step in range(len(job.plans))]
            for kind in ("measured", "machine")
        )
        measured, predicted = [sum(each) for each in batches], [made.time for made in job.plans]
        return {
            "plans": job.plans,
            "batches": batches,
            "seconds": measured,
            "machine": [sum(each) for each in machine],
            "predicted": predicted,
            "error": sum(abs(p / m - 1.0) for p, m in zip(predicted, measured)) / len(measured),
            "micro_batches": [len(made.micro_batches) for made in job.plans],
            "degrees": sorted({group.degree for made in job.plans for batch in made.micro_batches for group in batch.groups}),
        }


def _slowest(batch: MicroBatch, lengths: Sequence[int], seconds: float) -> Sample:
    group = max(batch.groups, key=lambda each: each.time)
    return Sample(tuple(lengths[index] for index in group.documents), group.degree, seconds, group.ranks.start)


def _layers(shape: Shape, times: dict[str, float]) -> list[float]:
    """Seconds of each layer and the head."""
    return [times[letter] for letter in (*shape.layers, HEAD)]


def _config(layers: str, options: argparse.Namespace) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            vocab_size=256,
            hidden_size=options.width,
            num_heads=options.heads,
            num_layers=len(layers),
            pattern=layers,
            linear_mixer="linear_attention",
        )
    )


def _shares(lengths: Sequence[int], ranks: int) -> list[int]:
    """What ranks hold of documents of these lengths, in groups of any degree."""
    degrees = [1 << power for power in range(ranks.bit_length())]
    return sorted({length // degree for length in lengths for degree in degrees})


def show(found: dict[str, Any], options: argparse.Namespace, console: Console) -> None:
    """One table, and the errors of the fit."""
    slow = ", ".join(f"{row['layers']} {row['slow']:.2g}" for row in found["rows"])
    console.print(
        f"{found['device']}; {options.ranks} ranks, {options.node} a node, {options.memory_tokens:,} tokens a rank; "
        f"width {options.width}; steps of {options.documents} documents of up to {found['longest']:,} tokens, "
        f"{', '.join(f'{tokens:,}' for tokens in found['tokens'])} in all; "
        f"wire {found['inside'] / 1e6:,.0f} and {found['across'] / 1e6:,.1f} MB/s, {options.delay:g} ms; kernels slept for the "
        f"time they took alone at these lengths; sleeps and wire times {slow}; {found['seconds'] / 60:.1f} minutes",
        highlight=False,
        soft_wrap=True,
    )
    columns = ("degrees", "micro-batches", "s a step", "of it this machine's own", "over planned", "prediction error")
    table = Table("layers", "contestant", *columns)
    for row in found["rows"]:
        base = sum(row["contestants"][PLANNED]["seconds"])
        for name, each in row["contestants"].items():
            seconds = each["seconds"]
            table.add_row(
                row["layers"],
                name,
                ", ".join(map(str, each["degrees"])),
                ", ".join(map(str, each["micro_batches"])),
                f"{sum(seconds) / len(seconds):.2f}",
                f"{sum(each['machine']) / len(seconds):.2f}",
                f"{sum(seconds) / base:.2f}",
                f"{each['error']:.1%}",
            )
    console.print(table)
    for row in found["rows"]:
        best = min((each for name, each in row["contestants"].items() if name != PLANNED), key=lambda each: sum(each["seconds"]))
        most = sum(best["predicted"]) / sum(row["bound"])
        said = f"{row['layers']}: under the cost model no plan is more than {most:.2f} times as fast as the best degree"
        console.print(said, highlight=False, soft_wrap=True)
    if found["crossover"] is not None:
        said = f"a softmax layer's quadratic work is as much as its linear work at {found['crossover']:,.0f} tokens"
        console.print(said, highlight=False, soft_wrap=True)
    errors = ", ".join(f"{name} {error:.1%}" for name, error in found["errors"].items() if name != DENSE)
    console.print(f"mean error of the fit on held-out lengths: {errors}", highlight=False, soft_wrap=True)
    before = ", ".join(f"{row['layers']} {row['first error']:.1%}" for row in found["rows"])
    console.print(f"prediction error of the first step, from kernels alone: {before}", highlight=False, soft_wrap=True)


def main(argv: Sequence[str]) -> int:
    """`longhaul bench planner`."""
    parser = argparse.ArgumentParser(prog="longhaul bench planner", description=__doc__.splitlines()[0])
    for name, value, text in (
        ("ranks", 8, "processes, a power of two"),
        ("node", 4, "ranks of an emulated node"),
        ("memory-tokens", 1100, "that fit on a rank"),
        ("documents", 64, "of a step"),
        ("steps", 3, "the first of which teaches the planner, the others are measured"),
        ("longest", 8192, "tokens; longer documents are left out"),
        ("layers", 4, "of the model"),
        ("heads", 8, "of a layer"),
        ("width", 512, "of the model"),
        ("repeats", 2, "of each kernel of less than a second; the least counts"),
        ("seed", 1, "of the order of documents"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default: %(default)s)")
    parser.add_argument("--patterns", nargs="+", default=["N", "LLLN"], help="of L and N, each repeated (default: N LLLN)")
    parser.add_argument("--delay", type=float, default=0.2, help="ms of the emulated wire (default: %(default)s)")
    parser.add_argument("--pace", type=float, default=1.5, help="seconds that a planned micro-batch shall take: sleeps and wire "
                        "are stretched or shortened so (default: %(default)s)")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=15, help="that all may take (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args(argv)
    for name in ("ranks", "node", "memory_tokens", "documents", "steps", "layers", "heads", "repeats"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}: give at least 1.")
    if options.steps < 2:
        raise UserError(f"--steps is {options.steps}: give at least 2, for the first one teaches the planner.")
    for name in ("pace", "minutes", "delay"):
        if not getattr(options, name) >= (0 if name == "delay" else 1e-3):
            raise UserError(f"--{name} is {getattr(options, name):g}: give a number above 0.")
    if options.ranks < 2 or options.ranks & (options.ranks - 1) or options.ranks > 8:
        raise UserError(f"--ranks is {options.ranks}: give 2, 4 or 8.")
    if options.longest < 128 or options.longest > options.ranks * options.memory_tokens:
        raise UserError(
            f"--longest is {options.longest}: give at least 128, and no more than the {options.ranks * options.memory_tokens} "
            "tokens that all ranks hold."
        )
    for pattern in options.patterns:
        if not pattern or set(pattern) - {"L", "N"} or options.layers % len(pattern):
            raise UserError(f"--patterns has {pattern!r}: give letters L and N whose number divides --layers {options.layers}.")
    if options.width % options.heads or (options.heads < options.ranks and any("N" in each for each in options.patterns)):
        raise UserError(
            f"--heads is {options.heads}: give a divisor of --width {options.width} of at least --ranks {options.ranks}, for an "
            "all-to-all divides heads."
        )
    found = run(options)
    show(found, options, Console() if sys.stdout.isatty() else Console(width=150))  # a file has no width to fit in
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0
