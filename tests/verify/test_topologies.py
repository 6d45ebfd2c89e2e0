"""The spread of topologies: each case on test ranks, what the spread covers, and the committed table of combinations."""

from pathlib import Path

import pytest

from longhaul.launcher.verify.ranks import Answer
from longhaul.launcher.verify.results import FAILED, PASSED, REFUSED, Verdict
from longhaul.launcher.verify.topologies import combinations
from longhaul.launcher.verify.topologies.cases import (
    BACKENDS,
    CHECKPOINTING,
    ENGINES,
    OPTIONS,
    SCHEDULES,
    TOPOLOGIES,
    Case,
)
from longhaul.launcher.verify.topologies.command import judge_case
from longhaul.launcher.verify.topologies.job import Asked
from longhaul.launcher.verify.topologies.matrix import SPREAD, ZERO, Narrowing, chosen, have_deepspeed, spread, whole
from longhaul.launcher.verify.topologies.models import MODELS
from tests.harness.pool import run_ranks

from .ranks import case_checked

TABLE = Path(__file__).parents[2] / "docs" / "combinations.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("topologies"))


def verdict_on(case: Case, folder: str) -> Verdict:
    answers = run_ranks(case_checked, case.ranks, timeout=300, asked=Asked(case, folder))
    return judge_case(case, [Answer(*answer) for answer in answers], 0.0)


@pytest.mark.parametrize("case", chosen(spread(), Narrowing()), ids=lambda case: case.key.replace(", ", "-"))
def test_a_topology_takes_the_steps_of_one_process(case: Case, folder: str) -> None:
    if case.backend in ZERO and not case.refused and not have_deepspeed():
        pytest.skip("DeepSpeed is not installed: pip install 'longhaul[deepspeed]'")
    verdict = verdict_on(case, folder)
    assert verdict.status == (REFUSED if case.refused else PASSED), (verdict.failures, verdict.message)
    assert not case.refused or (verdict.message.endswith(".") and "\n" not in verdict.message)


def test_the_spread_meets_every_value_of_every_axis() -> None:
    axes = {"model": MODELS, "backend": BACKENDS, "checkpointing": CHECKPOINTING, "engines": ENGINES}
    for axis, values in {**axes, "schedule": ("", *SCHEDULES)}.items():
        assert {getattr(case, axis) for case in SPREAD} == set(values), axis
    assert {case.topology for case in spread()} == set(TOPOLOGIES)
    assert {case.option for case in spread()} == set(OPTIONS)
    assert set(spread()) <= set(whole())


def test_the_whole_list_has_every_model_on_every_mesh() -> None:
    served = {(case.model, case.topology) for case in whole() if not case.refused}
    for model in MODELS:
        for topology in TOPOLOGIES:
            fits = (model == "moe" or "ep2" not in topology) and not (model == "encoder" and "pp2" in topology)
            assert ((model, topology) in served) == (fits and topology != "pp2 x ep2 x sp2"), (model, topology)
    for model in MODELS:
        own = {case.backend for case in whole() if case.model == model}
        assert own >= {"ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3"}
        assert {case.checkpointing for case in whole() if case.model == model} == set(CHECKPOINTING)
        schedules = {case.schedule for case in whole() if case.model == model}
        assert schedules >= set(SCHEDULES[:3]) or model == "encoder"


def test_a_refusal_where_none_is_due_fails() -> None:
    case = SPREAD[0]
    assert judge_case(case, [Answer("refused", {}, "No.")] * 8, 0.0).status == FAILED
    assert judge_case(case._replace(refused=True), [Answer("refused", {}, "No.")] * 8, 0.0).status == REFUSED


def test_the_table_is_made_of_verdicts() -> None:
    cases = [case for case in SPREAD if case.topology in ("pp2", "sp2")]
    refused = next(case for case in spread() if case.refused)
    verdicts = [Verdict(case, PASSED, 1.0, 2e-13) for case in cases] + [Verdict(refused, REFUSED, 0.0, 0.0, (), "Because.")]
    made = combinations.text(verdicts, whole=False)
    assert combinations.keys_in(made) == {verdict.cell.key for verdict in verdicts}
    assert "2.0e-13" in made and "Because." in made and "| dualpipev |" in made


def test_the_committed_table_has_every_case() -> None:
    """A list that changes asks for the table to be made again: `longhaul verify --topologies --markdown FILE`."""
    document = TABLE.read_text(encoding="utf-8")
    listed = whole() if combinations.WHOLE in document else spread()
    assert combinations.keys_in(document) == {case.key for case in listed}
