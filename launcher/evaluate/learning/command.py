"""`longhaul evaluate learning`: which runs make the table, two at a time, and the table."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from rich.console import Console, Group
from rich.table import Table

from longhaul.models.errors import UserError

from .contrasts import CONTRASTS, MARGIN, TABLE, Contrast, configuration
from .results import ResultsFile, key
from .tasks import TASKS
from .train import Outcome, Run, train

EPILOG = """\
Every model of a task is trained at each learning rate with seed 0. The rate that answers most of a validation set right is
kept, and the other seeds run at it. Accuracies are of test documents, the mean over seeds (their range in parentheses).
Runs are single-threaded and repeat exactly on one machine. An interrupted table goes on where it ended.
"""


class Row(NamedTuple):
    """A line of the table: one model on one task, its runs at the chosen rate by seed."""

    task: str
    model: str
    lr: float
    seeds: dict[int, Outcome]
    sweep: dict[float, float]
    """Validation accuracy of the first seed at each rate."""
    seconds: float
    """CPU time of all its runs."""


def main(argv: Sequence[str]) -> int:
    """Run it. Returns 0."""
    options = _parse(argv)
    lines = [
        (task, model)
        for task, models in TABLE.items()
        for model in models
        if (not options.task or task in options.task) and (not options.model or model in options.model)
    ]
    if not lines:
        raise UserError(f"No model of --model {' '.join(options.model)} is trained on --task {' '.join(options.task)}.")
    console = Console(width=None if Console().is_terminal else 140)
    kept = ResultsFile(options.results)
    started = time.perf_counter()
    rows = run_lines(console, lines, range(options.seeds), options.steps, options.workers, kept)
    console.print(tables(rows), highlight=False)
    result = as_json(rows)
    path = options.json or options.results.with_suffix(".json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"The table cannot be written to {path} ({error.strerror}): give another --json.") from None
    seconds = time.perf_counter() - started
    console.print(f"{seconds:.0f} s now, {result['cpu_seconds']:.0f} CPU seconds in all; numbers in {path}", highlight=False)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="longhaul evaluate learning",
        description="Train small models on synthetic tasks on the CPU, and print what they reach.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    models = sorted({model for models in TABLE.values() for model in models})
    parser.add_argument("--task", nargs="+", default=[], metavar="NAME", help=f"only these: {', '.join(TABLE)}")
    parser.add_argument("--model", nargs="+", default=[], metavar="NAME", help=f"only these: {', '.join(models)}")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="of each line of the table (default: %(default)s)")
    parser.add_argument("--steps", type=int, metavar="N", help="of a run at most, instead of the task's own")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="runs at a time (default: %(default)s)")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("runs/learning.jsonl"),
        metavar="FILE",
        help="keep outcomes here and skip runs that have one (JSON lines; default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the table (default: beside --results)")
    options = parser.parse_args(list(argv))
    for name, known in (("task", list(TABLE)), ("model", models)):
        for given in getattr(options, name):
            if given not in known:
                raise UserError(f"--{name} {given!r} is none of {', '.join(known)}.")
    for name in ("seeds", "workers", "steps"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}: give 1 or more.")
    return options


def run_lines(
    console: Console, lines: Sequence[tuple[str, str]], seeds: range, steps: int | None, workers: int, kept: ResultsFile
) -> list[Row]:
    """Rows for the lines (task, model), in their order, from runs that are kept or made now."""
    outcomes = kept.read()
    plans = {line: _plan(*line, seeds, steps) for line in lines}
    waiting: dict[tuple[str, str], Run] = {}

    def advance(line: tuple[str, str], outcome: Outcome | None) -> None:
        """Give the plan what it waits for, until it asks for a run that is not kept."""
        try:
            run = plans[line].send(outcome)
            while key(run) in outcomes:
                run = plans[line].send(outcomes[key(run)])
            waiting[line] = run
        except StopIteration as finished:
            rows[line] = finished.value

    rows: dict[tuple[str, str], Row] = {}
    for line in lines:
        advance(line, None)
    with _Here() if workers == 1 else ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        under_way: dict[Future[Outcome], tuple[tuple[str, str], Run]] = {}
        while waiting or under_way:
            while waiting and len(under_way) < workers:
                line = next(iter(waiting))
                run = waiting.pop(line)
                under_way[pool.submit(train, run)] = line, run
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                line, run = under_way.pop(future)
                outcome = future.result()
                kept.append(run, outcome)
                console.print(_line(run, outcome), highlight=False, soft_wrap=True)
                advance(line, outcome)
    return [rows[line] for line in lines]


class _Here(Executor):
    """This process, for one run at a time."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args, **options))
        return future


def _plan(task: str, model: str, seeds: range, steps: int | None) -> Generator[Run, Outcome | None, Row]:
    """Yields runs, is sent their outcomes, returns the row: a sweep with the first seed, the others at the best rate."""

    def run(lr: float, seed: int) -> Run:
        return Run(task, model, configuration(task, model), lr, seed, steps or TASKS[task].steps)

    sweep: dict[float, Outcome] = {}
    for lr in TASKS[task].rates:
        sweep[lr] = _made((yield run(lr, seeds[0])))
    # Of equals, the one that was there first, then the one of the smaller loss.
    best = max(sweep, key=lambda lr: (sweep[lr].validation, -sweep[lr].steps, -sweep[lr].loss))
    found = {seeds[0]: sweep[best]}
    for seed in seeds[1:]:
        found[seed] = _made((yield run(best, seed)))
    seconds = sum(outcome.seconds for outcome in [*sweep.values(), *list(found.values())[1:]])
    return Row(task, model, best, found, {lr: outcome.validation for lr, outcome in sweep.items()}, seconds)


def _made(outcome: Outcome | None) -> Outcome:
    assert outcome is not None, "a plan that has begun is sent outcomes"
    return outcome


def _line(run: Run, outcome: Outcome) -> str:
    numbers = ", ".join(f"{100 * value:.1f} % at {length}" for length, value in outcome.accuracy.items())
    return f"{run.task} {run.model}, lr {run.lr:g}, seed {run.seed}: {numbers} ({outcome.steps} steps, {outcome.seconds:.0f} s)"


def tables(rows: Sequence[Row]) -> Group:
    """A table a task, and the contrasts whose sides are both there."""
    made: list[Any] = []
    for name in dict.fromkeys(row.task for row in rows):
        task = TASKS[name]
        title = f"{name}: share of answers that are right (chance {100 * task.chance:.1f} %), by tokens of a document"
        table = Table(title=title, title_justify="left")
        table.add_column("model")
        for length in task.test_lengths:
            beyond = " (longer than trained)" if length > task.train_lengths[-1] else ""
            table.add_column(f"{length}{beyond}", justify="right")
        for column in ("steps", "lr", "parameters", "state, bytes"):
            table.add_column(column, justify="right")
        for row in rows:
            if row.task == name:
                some = next(iter(row.seeds.values()))
                steps = "-".join(map(str, dict.fromkeys(f([o.steps for o in row.seeds.values()]) for f in (min, max))))
                cells = [spread([outcome.accuracy[length] for outcome in row.seeds.values()]) for length in task.test_lengths]
                table.add_row(row.model, *cells, steps, f"{row.lr:g}", f"{some.parameters:,}", f"{some.state_bytes:,}")
        made.append(table)
    table = Table(title="What was claimed", title_justify="left")
    for column in ("claim", "task", "length", "seeds", "measured"):
        table.add_column(column)
    for contrast, better, worse, held in judged(rows):
        seeds = len(better)
        verdict = {True: "seen", False: "not seen", None: "seeds disagree"}[held]
        measured = f"{verdict}: {spread(better)} against {spread(worse)} %"
        table.add_row(contrast.claim, contrast.task, str(contrast.length), str(seeds), measured)
    if table.row_count:
        made.append(table)
    return Group(*made)


def judged(rows: Sequence[Row]) -> list[tuple[Contrast, list[float], list[float], bool | None]]:
    """The contrasts with the accuracies of both sides by seed, and whether the claim holds: for every seed of one side against
    every seed of the other (True, False), or only for some (None). A difference below `MARGIN` is none.
    """
    found: list[tuple[Contrast, list[float], list[float], bool | None]] = []
    lines = {(row.task, row.model): row for row in rows}
    for contrast in CONTRASTS:
        sides = [lines.get((contrast.task, model)) for model in (contrast.better, contrast.worse)]
        if sides[0] is None or sides[1] is None:
            continue
        better, worse = ([o.accuracy[contrast.length] for o in side.seeds.values()] for side in sides if side is not None)
        held = None
        if min(better) > max(worse) + MARGIN:
            held = True
        elif max(better) <= min(worse) + MARGIN:
            held = False
        found.append((contrast, better, worse, held))
    return found


def spread(values: Sequence[float]) -> str:
    """Mean and range, in percent."""
    middle = f"{100 * mean(values):.1f}"
    return middle if len(values) == 1 else f"{middle} ({100 * min(values):.1f}-{100 * max(values):.1f})"


def as_json(rows: Sequence[Row]) -> dict[str, Any]:
    """All of it, plain."""
    lines = []
    for row in rows:
        seeds = {seed: asdict(outcome) for seed, outcome in row.seeds.items()}
        known = {"chance": TASKS[row.task].chance, "config": configuration(row.task, row.model)}
        lines.append({**row._asdict(), **known, "seeds": seeds})
    contrasts = [
        {**contrast._asdict(), "better_accuracy": better, "worse_accuracy": worse, "held": held}
        for contrast, better, worse, held in judged(rows)
    ]
    return {"rows": lines, "contrasts": contrasts, "cpu_seconds": sum(row.seconds for row in rows)}
