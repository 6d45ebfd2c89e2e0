"""`longhaul bench planner`: steps of long-tailed documents on a few ranks, planned and of one degree, side by side.

The documents are the sources of Python, at the length scale of a BPE (bytes / 3.6), rounded up to a grid of four lengths an
octave. Every kernel is timed here, alone, at the lengths that ranks will hold: a linear layer and the head on a rank's share
of a document, a softmax layer on the two chunks of the zigzag layout. More ranks than cores cannot compute side by side,
so each rank *sleeps* for those times, never for the fitted model's; groups, exchanges of states and all-to-alls are real, on
an emulated wire. The planner knows half of the lengths, through `longhaul plan calibrate`'s fit; the others are held out.
After the first step it also knows, as in training, what micro-batches took.

The wire is as fast beside this machine's kernels as the published cluster's links are beside its GPUs: an all-to-all across
nodes takes 2.2 times the linear work of a layer, inside a node 0.11 times.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from longhaul.launcher.config import TrainConfig
from longhaul.launcher.data import open_corpus
from longhaul.launcher.data.packing import shuffled
from longhaul.launcher.metrics.hardware import device_name
from longhaul.launcher.plan.calibrate import Calibration, Clock, Timed, fit, profile
from longhaul.launcher.plan.census import DENSE, ModelFacts, facts_of
from longhaul.launcher.plan.costs import Constants, cost_model
from longhaul.models.block import Block
from longhaul.models.config import ModelConfig
from longhaul.models.errors import UserError
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import KVState, WholeSequence
from longhaul.parallel.planner import Cluster, CostModel, Link, MicroBatch, Plan, plan
from longhaul.parallel.planner.calibrate import Sample
from longhaul.parallel.planner.learn import Learner
from longhaul.parallel.planner.plan import planned
from longhaul.parallel.planner.problem import Problem, Work
from longhaul.parallel.planner.static import fixed

from .planner_ranks import HEAD, Job, Links, Shape, measure
from .ranks import run_on_ranks

STEPS_OF_OCTAVE = (16, 19, 23, 27)  # times a power of two, so that halves of a length of the grid are on it
BYTES_A_TOKEN = 3.6
ACROSS, INSIDE = 2.2, 0.11  # all-to-all over linear work, of the published cluster beyond a node and inside
UNLIMITED = 1 << 60
PLANNED = "planned"

Times = dict[tuple[str, int, int], float]  # (letter or head, tokens of a document, degree) -> seconds on a rank, without overhead


def grid(longest: int) -> list[int]:
    """Lengths from 128 tokens up."""
    return [step << power for power in range(3, 30) for step in STEPS_OF_OCTAVE if step << power <= longest]


def lengths_of(steps: int, documents: int, longest: int, seed: int) -> list[list[int]]:
    """Lengths of the documents of each step, on the grid; longer documents are left out, as a context limit does."""
    found = []
    allowed = grid(longest)
    tokens = open_corpus(()).lengths
    for index in shuffled(len(tokens), seed, 0):
        scaled = tokens[index] / BYTES_A_TOKEN
        fitting = [length for length in allowed if length >= scaled]
        if fitting:
            found.append(fitting[0])
    if len(found) < steps * documents:
        raise UserError(
            f"Python's sources here have {len(found)} documents of at most {longest} tokens, but --steps {steps} need "
            f"{steps * documents}: lower --steps or --documents."
        )
    return [found[step * documents : (step + 1) * documents] for step in range(steps)]


def kernel_times(config: TrainConfig, facts: ModelFacts, ranks: int, lengths: Sequence[int], overhead: dict[str, float],
                 whole: Sequence[Timed]) -> Times:  # fmt: skip
    """Seconds of each kind of layer on a rank's share of a document, one call's overhead left out."""
    letters = {layer.mixer: layer.letter for layer in facts.layers} | {HEAD: HEAD}
    alone = {(letters[each.mixer], each.tokens): each.seconds for each in whole}
    found: Times = {}
    chunks = _Chunks(config.model) if "N" in letters.values() else None
    for letter in letters.values():
        for tokens in lengths:
            found[letter, tokens, 1] = max(0.0, alone[letter, tokens] - overhead[letter])
            degree = 2
            while degree <= ranks:
                if letter == "N" and chunks is not None:
                    seconds = chunks.seconds(tokens, degree) - 2 * overhead[letter]
                else:
                    seconds = alone[letter, tokens // degree] - overhead[letter]
                found[letter, tokens, degree] = max(0.0, seconds)
                degree *= 2
    return found


class _Chunks:
    """Times of a softmax layer on the first and the last of the 2P chunks of a document: what the zigzag layout gives a rank."""

    def __init__(self, model: ModelConfig) -> None:
        self.block, self.width = Block(model, model.layers.index("N")), model.hidden_size
        self.block.reset_parameters()
        self.clock = Clock(torch.device("cpu"), 1)

    def seconds(self, tokens: int, degree: int) -> float:
        chunk = tokens // (2 * degree)
        return sum(self.clock("N", chunk, self._run(chunk, before)) for before in (0, tokens - chunk))

    def _run(self, tokens: int, before: int) -> Any:
        mixer: Any = self.block.mixer
        x = torch.randn(tokens, self.width, requires_grad=True)
        past = [torch.randn(before, mixer.num_kv_heads, mixer.head_dim, requires_grad=True) for _ in range(2)]
        shard = WholeSequence(Documents((0, tokens), first_position=before))

        def run() -> None:
            self.block(x, shard, KVState(*past) if before else None).x.sum().backward()
            self.block.zero_grad(set_to_none=True)

        return run


def static_plan(lengths: Sequence[int], cluster: Cluster, model: CostModel, degree: int) -> Plan | None:
    """The step on groups of one degree; None if a document does not fit."""
    problem, work = Problem(lengths, cluster, model), Work(UNLIMITED)
    shelves = fixed(problem, degree, work)
    return None if shelves is None else planned(problem, {f"degree {degree}": shelves}, work)


def job_of(name: str, plans: Sequence[Plan], steps: Sequence[Sequence[int]], times: Times, overhead: dict[str, float]) -> Job:
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
    steps = lengths_of(options.steps, options.documents, options.longest, options.seed)
    shapes = [Shape(pattern * (options.layers // len(pattern)), options.heads, options.width) for pattern in options.patterns]
    letters = "".join(dict.fromkeys("".join(options.patterns)))
    config = _config(letters, options)
    facts, lengths = facts_of(config.model), grid(options.longest)
    least = [length for length in _shares(lengths, options.ranks) if length not in lengths]
    clock = Clock(torch.device("cpu"), options.repeats)
    others = [1, *least, *lengths[1::2]]
    seen = profile(config, facts, clock, clock.device, lengths[::2], others, UNLIMITED, options.repeats)
    letter_of = {layer.mixer: layer.letter for layer in facts.layers} | {HEAD: HEAD}
    overhead = {letter_of[each.mixer]: each.seconds for each in seen if each.tokens == 1}
    times = kernel_times(config, facts, options.ranks, lengths, overhead, seen)
    fitted = fit(facts, [each for each in seen if each.tokens in lengths])
    longest = max(lengths)
    a_token = times["L", longest, 1] / longest if "L" in letters else times["N", lengths[0], 1] / lengths[0]
    bytes_a_token = 2 * 4 * 4 * options.width
    inside, across = (bytes_a_token / (share * a_token) for share in (INSIDE, ACROSS))
    links = Links(options.node, options.delay * 1e-3, inside, across, options.slow)
    rows = [_pattern(shape, steps, fitted, times, overhead, links, options) for shape in shapes]
    return {
        "rows": rows, "errors": fitted.errors, "device": device_name(torch.device("cpu")), "inside": links.inside,
        "across": links.across, "tokens": [sum(step) for step in steps[1:]], "longest": longest,
    }  # fmt: skip


def _pattern(
    shape: Shape, steps: Sequence[Sequence[int]], fitted: Calibration, times: Times, overhead: dict[str, float], links: Links,
    options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    config = _config(shape.layers, options)
    facts = facts_of(config.model)
    model = cost_model(
        facts, config, Constants("measured", fitted.rates), options.ranks, linear_engine="all_gather", softmax_engine="head_split"
    )
    # The kernels that are slept have no model states; memory is what --memory-tokens says.
    own = {letter: overhead[letter] for letter in dict.fromkeys((*shape.layers, HEAD))}
    model = replace(model, fixed_bytes=0.0, bias=max(model.bias, sum(_layers(shape, own))))
    levels = (Link(links.node, links.inside, links.delay), Link(options.ranks, links.across, links.delay))
    memory = (options.memory_tokens + 0.5) * model.bytes_per_token
    carried = {}
    for size in (1 << power for power in range(1, options.ranks.bit_length())):  # a rank's own part does not travel
        carried[size] = (links.inside if size <= links.node else links.across) * size / (size - 1)
    cluster = Cluster(options.ranks, memory, levels if links.node < options.ranks else levels[:1], carried)
    # The first step is planned with what the kernels say; its micro-batches teach the rest what a micro-batch costs here.
    first = _contest(shape, steps[:1], cluster, model, times, own, links, options)
    learner = Learner(model, cluster)
    for found in first.values():
        made, seconds = found["plans"][0], found["batches"][0]
        pairs = zip(made.micro_batches, seconds, strict=True)
        learner = learner.update([_slowest(batch, steps[0], time) for batch, time in pairs])
    then = _contest(shape, steps[1:], cluster, learner.model, times, own, links, options)
    row: dict[str, Any] = {"layers": shape.layers, "first error": first[PLANNED]["error"], "contestants": {}}
    for name, found in then.items():
        row["contestants"][name] = {key: value for key, value in found.items() if key not in ("plans", "batches")}
    return row


def _slowest(batch: MicroBatch, lengths: Sequence[int], seconds: float) -> Sample:
    group = max(batch.groups, key=lambda each: each.time)
    return Sample(tuple(lengths[index] for index in group.documents), group.degree, seconds, group.ranks.start)


def _contest(
    shape: Shape, steps: Sequence[Sequence[int]], cluster: Cluster, model: CostModel, times: Times, overhead: dict[str, float],
    links: Links, options: argparse.Namespace,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """The planned steps, and those of every degree that holds all documents; what they took and should have taken."""
    contestants = {PLANNED: [plan(lengths, cluster, model, pod_ranks=0) for lengths in steps]}
    for degree in cluster.degrees:
        plans = [static_plan(lengths, cluster, model, degree) for lengths in steps]
        found = [each for each in plans if each is not None]
        if len(found) == len(plans):
            contestants[f"degree {degree}"] = found
    jobs = [job_of(name, plans, steps, times, overhead) for name, plans in contestants.items()]
    seen = run_on_ranks(measure, options.ranks, 1, shape, links, "all_gather", jobs)
    results = {}
    for job in jobs:
        batches = [[max(batch) for batch in zip(*(rank[job.name][step] for rank in seen))] for step in range(len(steps))]
        measured, predicted = [sum(each) for each in batches], [made.time for made in job.plans]
        results[job.name] = {
            "plans": job.plans,
            "batches": batches,
            "seconds": measured,
            "slept": [sum(max(sum(_layers(shape, each)) for each in batch) for batch in step) for step in job.seconds],
            "predicted": predicted,
            "error": sum(abs(p / m - 1.0) for p, m in zip(predicted, measured)) / len(measured),
            "micro_batches": [len(made.micro_batches) for made in job.plans],
            "degrees": sorted({group.degree for made in job.plans for batch in made.micro_batches for group in batch.groups}),
        }
    return results


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
    console.print(
        f"{found['device']}; {options.ranks} ranks, {options.node} a node, {options.memory_tokens:,} tokens a rank; "
        f"steps of {options.documents} documents of up to {found['longest']:,} tokens, "
        f"{', '.join(f'{tokens:,}' for tokens in found['tokens'])} in all; "
        f"wire {found['inside'] / 1e6:,.0f} and {found['across'] / 1e6:,.1f} MB/s, {options.delay:g} ms; kernels slept for the "
        f"time they took alone at these lengths, in slow motion {options.slow:g}",
        highlight=False,
        soft_wrap=True,
    )
    columns = ("degrees", "micro-batches", "s a step", "of it slept", "over planned", "prediction error")
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
                f"{sum(each['slept']) / len(seconds):.2f}",
                f"{sum(seconds) / base:.2f}",
                f"{each['error']:.1%}",
            )
    console.print(table)
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
        ("heads", 4, "of a layer"),
        ("width", 128, "of the model"),
        ("repeats", 2, "of each kernel; the least counts"),
        ("seed", 1, "of the order of documents"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default: %(default)s)")
    parser.add_argument("--patterns", nargs="+", default=["N", "LLLN"], help="of L and N, each repeated (default: N LLLN)")
    parser.add_argument("--delay", type=float, default=0.2, help="ms of the emulated wire (default: %(default)s)")
    parser.add_argument("--slow", type=float, default=2.5, help="slow motion of sleeps and wire (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args(argv)
    for name in ("ranks", "node", "memory_tokens", "documents", "steps", "layers", "heads", "repeats"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}: give at least 1.")
    if options.steps < 2 or not options.slow > 0:
        raise UserError(f"--steps is {options.steps} and --slow {options.slow:g}: give at least 2 steps, and a number above 0.")
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
    found = run(options)
    show(found, options, Console() if sys.stdout.isatty() else Console(width=150))  # a file has no width to fit in
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0
