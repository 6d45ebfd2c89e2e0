"""`longhaul verify --topologies`, from the command line."""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

import longhaul.launcher
import longhaul.models
import longhaul.parallel
from longhaul.launcher.lines import fingerprint_of
from longhaul.models.errors import UserError

from ..crew import Crew, crew_size
from ..ranks import CASE_TIMEOUT, LIFETIME, Answer, Pool
from ..report import Display, verdicts_json, write_json
from ..results import FAILED, REFUSED, ResultsFile, Verdict, judge
from . import combinations, report
from .cases import Case
from .job import Asked
from .matrix import ZERO, Narrowing, chosen, have_deepspeed, spread, whole

if TYPE_CHECKING:
    import argparse


def main(console: Console, arguments: argparse.Namespace) -> int:
    """Run the cases asked for. Returns 0 if all passed, 1 if one failed."""
    narrowing = Narrowing(tuple(arguments.model), tuple(arguments.topology), tuple(arguments.backend))
    if arguments.markdown is not None and any(narrowing):
        raise UserError("--markdown describes the spread of topologies, or with --all the whole list: ask for nothing narrower.")
    cases = chosen(whole() if arguments.all else spread(), narrowing)
    if not have_deepspeed():
        left = [case for case in cases if case.backend not in ZERO or case.refused]
        if len(left) < len(cases):
            console.print(f"{len(cases) - len(left)} cases of ZeRO are left out: DeepSpeed is not installed.", highlight=False)
        cases = left
    if not cases:
        raise UserError("No case is left of the topologies: ask for fewer conditions at once.")
    path = arguments.results or (Path("runs/verify/topologies.jsonl") if arguments.all else None)
    kept = ResultsFile(path, Case, sources()) if path is not None else None
    verdicts = _run(console, cases, kept, arguments.pools)
    report.summarise(console, verdicts)
    if arguments.json is not None:
        write_json(arguments.json, verdicts_json(verdicts))
    failed = any(verdict.status == FAILED for verdict in verdicts)
    if arguments.markdown is not None:
        if failed:
            console.print(f"{arguments.markdown} is not written: something failed.", style="red", highlight=False)
        else:
            combinations.write(arguments.markdown, verdicts, arguments.all)
    return int(failed)


@functools.cache
def sources() -> str:
    """The fingerprint of all sources: a case runs most of them."""
    packages = (longhaul.models, longhaul.parallel, longhaul.launcher)
    return fingerprint_of(Path(folder) for package in packages for folder in package.__path__)


def judge_case(case: Case, answers: Sequence[Answer], seconds: float) -> Verdict:
    """The verdict on a case: a refusal where none is due is a failure."""
    verdict = judge(case, answers, seconds)
    if verdict.status == REFUSED and not case.refused:
        return Verdict(case, FAILED, seconds, message=f"refused: {verdict.message}")
    return verdict


def _run(console: Console, cases: Sequence[Case], kept: ResultsFile | None, pools: int | None) -> list[Verdict]:
    """The verdicts on all cases, in their order."""
    finished = kept.read() if kept is not None else {}
    todo = [case for case in cases if case not in finished]
    skipped = f", {len(cases) - len(todo)} of them finished before" if len(todo) < len(cases) else ""
    where = f"; verdicts in {kept.path}" if kept is not None else ""
    console.print(f"{len(cases)} cases{skipped}{where}", highlight=False, soft_wrap=True)
    verdicts = {case: finished[case] for case in cases if case in finished}
    display = Display(console, max(len(todo), 1))
    crew: Crew | None = None
    with tempfile.TemporaryDirectory(prefix="longhaul-topologies-") as folder:
        try:
            for ranks, group in itertools.groupby(todo, key=lambda case: case.ranks):
                if crew is not None:
                    crew.close()
                crew = Crew([Pool(ranks, "cpu", LIFETIME, CASE_TIMEOUT) for _ in range(pools or crew_size(ranks, "cpu"))])
                for asked, answers, seconds in crew.run_all([Asked(case, folder) for case in group]):
                    verdict = judge_case(asked.case, answers, seconds)
                    verdicts[asked.case] = verdict
                    if kept is not None:
                        kept.append(verdict)
                    display.add(verdict)
        finally:
            display.close()
            if crew is not None:
                crew.close()
    return [verdicts[case] for case in cases]
