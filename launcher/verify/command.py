"""`longhaul verify`: the matrix from the command line."""

from __future__ import annotations

import argparse
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from longhaul.models.errors import UserError
from longhaul.parallel.runtime import Runtime

from . import report, traffic
from .cells import Cell, Narrowing, check_names, pairwise, refusal, whole
from .crew import Crew, crew_size
from .ranks import Answer, Job, Pool
from .results import FAILED, ResultsFile, Verdict, judge

DESCRIPTION = "Prove that N ranks equal one process: outputs, states and every gradient on every rank."

EPILOG = """\
Every cell is one mixer under one exchange (or attention engine), layout, table of documents, dtype and number of
ranks. In it, outputs, the final state and every gradient of every rank are compared with one process (1e-10 in fp64, 1e-5 in
fp32, RMS over RMS); a document is compared with itself alone; after an edit of a token nothing before it may
change, nor a bit of any other document. Gates are set to remember. What an engine refuses before the first step
is reported as refused, not as failed.

Without --all, a covering of all pairs of values on 2 and 3 ranks runs (minutes). --all runs the product on 1 to 4 ranks, and
a covering on these and on 6 and 8 in which mixers of one head, engines with options and wide stripes take part; it goes on
where it was interrupted: verdicts are kept in --results. Several cells run at once (--pools).

  longhaul verify --mixer mamba2 --engine ring --layout zigzag
  longhaul verify --bytes                      messages and bytes against the formulas
  longhaul verify --topologies                 real training steps on many meshes, backends and schedules (minutes)
  longhaul verify --topologies --all           all of them; resumable, verdicts in runs/verify/topologies.jsonl
  torchrun --nproc-per-node 4 -m longhaul.launcher.cli verify    on the ranks of a job (GPUs, if it has any)

A mixer of your own, by import path, as a class of torch.nn.Module with forward(x [T, D], shard, state) -> y, state, made by
build(model_config, layer) or by Class(hidden_size); remember(), if it has it, sets its gates slow, and
causal = False says that it reads a document both ways:

  # mine.py
  class Mean(torch.nn.Module):
      def __init__(self, hidden_size):
          super().__init__()
          self.out = torch.nn.Linear(hidden_size, hidden_size)
      def forward(self, x, shard, state=None):
          ...
          return self.out(y), state

  longhaul verify --module mine:Mean

Exit code: 0 all passed, 1 something failed, 2 a mistake in the command.
"""

SECONDS = {1: 0.05, 2: 0.08, 3: 0.12, 4: 0.15}  # of a cell on two cores, before any was timed


def main(argv: list[str]) -> int:
    """Run it. Returns 0 if all passed, 1 if a cell failed."""
    arguments = _parse(argv)
    console = Console(width=None if Console().is_terminal else 140)
    if arguments.bytes:
        return _bytes(console, arguments)
    if arguments.pools is not None and arguments.pools < 1:
        raise UserError(f"--pools {arguments.pools} must be at least 1.")
    if arguments.topologies:
        return _topologies(console, arguments)
    for name in ("model", "topology", "backend", "markdown"):
        if getattr(arguments, name):
            raise UserError(f"--{name} is of --topologies: add that, or leave it out.")
    narrowing = Narrowing(
        tuple(arguments.mixer) if arguments.module is None else (arguments.module,),
        tuple(arguments.engine),
        tuple(arguments.layout),
        tuple(arguments.documents),
        tuple(arguments.stream),
        tuple(arguments.dtype),
        tuple(arguments.ranks),
    )
    check_names(narrowing, arguments.module is not None)
    job = _job(arguments.device)
    if job is not None:
        if narrowing.ranks and job.world_size not in narrowing.ranks:
            raise UserError(f"--ranks {narrowing.ranks[0]}, but this job has {job.world_size} ranks: leave it out.")
        narrowing = narrowing._replace(ranks=(job.world_size,))
    cells = whole(narrowing) if arguments.all else pairwise(narrowing)
    if not cells:
        raise UserError("No cell is left of the matrix: ask for fewer conditions at once.")
    path = arguments.results or (Path("runs/verify/all.jsonl") if arguments.all else None)
    speaks = job is None or job.is_main
    if not speaks:
        console = Console(quiet=True)
    kept = ResultsFile(path) if path is not None else None
    finished = kept.read() if kept is not None and speaks else {}
    if job is not None:
        finished = job.on_main(lambda: finished)
    verdicts = _run(console, cells, finished, kept if speaks else None, job, arguments.device, arguments.pools)
    if speaks:
        report.summarise(console, verdicts)
        if arguments.json is not None:
            report.write_json(arguments.json, report.verdicts_json(verdicts))
    if job is not None:
        job.close()
    return int(any(verdict.status == FAILED for verdict in verdicts))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "longhaul verify", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="the whole matrix, resumable")
    parser.add_argument("--bytes", action="store_true", help="compare messages and bytes with the formulas instead")
    parser.add_argument("--topologies", action="store_true", help="verify the trainer's steps on many meshes instead")
    for name, text in (
        ("model", "with --topologies: only these models"),
        ("topology", "with --topologies: only these meshes, as 'dp2 x sp2'"),
        ("backend", "with --topologies: only these of ddp, fsdp, hsdp, zero1, zero2, zero3, zero3_offload"),
        ("mixer", "only these mixers (attention_window, *_one_head, encoder_* and language_model too)"),
        ("engine", "only these exchanges or attention engines (hierarchical_log, all_gather_sliced, ring_kv, ring_q too)"),
        ("layout", "only these layouts (uneven, empty_first, empty_middle, empty_last, striped_wide too)"),
        ("documents", "only these tables: one, many_short, edge, spanning, mixed"),
        ("stream", "only these: fresh, kept (a state flows out), continued (one flows in and out)"),
        ("dtype", "only these: fp64, fp32"),
    ):
        parser.add_argument(f"--{name}", nargs="+", default=[], metavar="NAME", help=text)
    parser.add_argument("--ranks", nargs="+", type=int, default=[], metavar="N", help="only these numbers of ranks")
    parser.add_argument("--pools", type=int, metavar="N", help="run so many cells at once (default: what keeps the cores busy)")
    parser.add_argument("--module", metavar="PACKAGE.MODULE:CLASS", help="verify a mixer of your own")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: GPUs where every rank has one")
    parser.add_argument("--results", type=Path, metavar="FILE", help="keep verdicts here and skip those that are (JSON lines)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all verdicts as one document")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="with --topologies: write the table of combinations")
    return parser.parse_args(argv)


def _job(device: str) -> Runtime | None:
    """The job this process was started in by torchrun, if any."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return None
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    torch.set_num_threads(1)
    return Runtime(rank, size, local_rank, "env://", device)


def _run(
    console: Console,
    cells: Sequence[Cell],
    finished: dict[Cell, Verdict],
    kept: ResultsFile | None,
    job: Runtime | None,
    device: str,
    pools: int | None,
) -> list[Verdict]:
    """The verdicts on all cells, in their order."""
    todo = [cell for cell in cells if cell not in finished]
    skipped = f", {len(cells) - len(todo)} of them finished before" if len(todo) < len(cells) else ""
    served = [cell for cell in todo if refusal(cell) is None]
    seconds = _estimate(served, finished.values(), lambda ranks: 1 if job else pools or crew_size(ranks, _device(device, ranks)))
    where = f"; verdicts in {kept.path}" if kept is not None else ""
    console.print(f"{len(cells)} cells{skipped}; about {_duration(seconds)}{where}", highlight=False, soft_wrap=True)
    display = report.Display(console, max(len(todo), 1))
    verdicts = {cell: finished[cell] for cell in cells if cell in finished}
    crew: Crew | None = None if job is None else Crew([Job(job)])

    def add(verdict: Verdict) -> None:
        verdicts[verdict.cell] = verdict
        if kept is not None:
            kept.append(verdict)
        display.add(verdict)

    try:
        for ranks, group in itertools.groupby(todo, key=lambda cell: cell.ranks):
            asked = list(group)
            for cell in asked:
                reason = refusal(cell)
                if reason is not None:
                    add(judge(cell, [Answer("refused", {}, reason)], 0.0))
            if job is None:
                if crew is not None:
                    crew.close()
                place = _device(device, ranks)
                crew = Crew([Pool(ranks, place) for _ in range(pools or crew_size(ranks, place))])
            assert crew is not None
            for cell, answers, seconds in crew.run_all([cell for cell in asked if refusal(cell) is None]):
                add(judge(cell, answers, seconds))
    finally:
        display.close()
        if crew is not None:
            crew.close()
    return [verdicts[cell] for cell in cells]


def _device(asked: str, ranks: int) -> str:
    """GPUs where there is one for every rank."""
    enough = torch.cuda.device_count() >= ranks
    if asked == "cuda" and not enough:
        raise UserError(f"--device cuda: {ranks} ranks want {ranks} GPUs, but this machine has {torch.cuda.device_count()}.")
    return "cuda" if asked != "cpu" and enough else "cpu"


def _estimate(cells: Sequence[Cell], finished: Iterable[Verdict], pools: Callable[[int], int]) -> float:
    """Seconds, from the cells already timed where there are some of as many ranks; with so many pools of them at once."""
    times: dict[int, list[float]] = {}
    for verdict in finished:
        if verdict.seconds:
            times.setdefault(verdict.cell.ranks, []).append(verdict.seconds)
    means = {ranks: sum(own) / len(own) for ranks, own in times.items()}
    counts = Counter(cell.ranks for cell in cells)
    return sum(
        count * (means[ranks] / pools(ranks) if ranks in means else SECONDS.get(ranks, 0.05 * ranks))
        for ranks, count in counts.items()
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _topologies(console: Console, arguments: argparse.Namespace) -> int:
    """The trainer on many meshes."""
    for name in ("mixer", "engine", "layout", "documents", "stream", "dtype", "ranks", "module"):
        if getattr(arguments, name):
            raise UserError(f"--{name} is of the matrix of engines, not of --topologies: leave one of the two out.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--topologies starts processes of its own, in many numbers: run it without torchrun.")
    from .topologies.command import main as topologies

    return topologies(console, arguments)


def _bytes(console: Console, arguments: argparse.Namespace) -> int:
    """Measured traffic against the formulas."""
    rows: list[Any] = traffic.measure(tuple(arguments.ranks) or (2, 3, 4), tuple(arguments.engine))
    traffic.summarise(console, rows)
    if arguments.json is not None:
        report.write_json(arguments.json, traffic.as_json(rows))
    return int(any(not row.equal for row in rows))
