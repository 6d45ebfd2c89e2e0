"""`longhaul evaluate learning`: answers checked by hand, equal memories, a table that goes on where it ended."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from longhaul.launcher.cli import main
from longhaul.launcher.evaluate.learning.command import Row, judged
from longhaul.launcher.evaluate.learning.contrasts import CONTRASTS, TABLE, configuration
from longhaul.launcher.evaluate.learning.tasks import NONE, TASKS
from longhaul.launcher.evaluate.learning.train import Outcome, Run, build, state_bytes, train


def after(tokens: list[int], t: int) -> int:
    """What followed token `t` when it was seen last before."""
    return tokens[max(s for s in range(t) if tokens[s] == tokens[t]) + 1]


def by_hand(name: str, tokens: list[int]) -> list[int]:
    """The answers of one document, from its tokens alone."""
    length, half = len(tokens), len(tokens) // 2
    if name == "mqar":
        asked = 2 * length // 3
        assert sorted(tokens[0:asked:2]) == sorted(set(tokens[asked:])), "each key is written once and asked once"
        return [NONE] * asked + [after(tokens, t) for t in range(asked, length)]
    if name == "induction":
        assert len(set(tokens[:half])) == half
        # What followed the first half's last token was the second half's first, chosen at random: nothing is asked there.
        last = tokens[half - 1]
        return [NONE] * half + [NONE if token == last else after([*tokens[:half], token], half) for token in tokens[half:]]
    if name == "parity":
        return [sum(tokens[: t + 1]) % 2 for t in range(length)]
    if name == "modular":
        return [sum(tokens[: t + 1]) % 3 for t in range(length)]
    asked = length - 3
    assert all(key in tokens[0:6:2] and tokens[:asked].count(key) == 1 for key in tokens[asked:]), "pairs come first"
    return [NONE] * asked + [after([*tokens[:asked], key], asked) for key in tokens[asked:]]


@pytest.mark.parametrize("name", TASKS)
def test_every_answer_follows_from_the_tokens(name: str) -> None:
    task, random = TASKS[name], np.random.default_rng(0)
    answers_seen: set[int] = set()
    for length in {*task.train_lengths, *task.test_lengths}:
        tokens, answers = task.sample(random, 8, length)
        assert tokens.shape == answers.shape == (8, length)
        assert tokens.min() >= 0 and tokens.max() < task.vocab_size and answers.max() < task.vocab_size
        for document in range(8):
            assert answers[document].tolist() == by_hand(name, tokens[document].tolist())
        answers_seen |= set(answers[answers != NONE].tolist())
        assert len({tuple(row) for row in tokens.tolist()}) == 8 or length < 6, "documents differ"
    assert task.chance == 1 / len(answers_seen), "a guess among all that may be asked"


SMOKE = {
    "mqar": "gated_deltanet",
    "induction": "linear_attention_conv",
    "parity": "paralstm",
    "modular": "mamba2",
    "long_recall": "memmamba",
}


@pytest.mark.parametrize("name", TASKS)
def test_twenty_steps_of_each_task(name: str) -> None:
    task, model = TASKS[name], SMOKE[name]
    run = Run(name, model, configuration(name, model), 1e-2, 0, 20)
    outcome = train(run)
    assert outcome.steps == 20 and outcome.parameters == sum(p.numel() for p in build(run.config, task.vocab_size).parameters())
    assert outcome.loss < train(replace(run, steps=1)).loss, "from the initial loss it falls at once"
    assert list(outcome.accuracy) == list(task.test_lengths)
    assert all(0 <= value <= 1 for value in [outcome.validation, *outcome.accuracy.values()])


def test_a_run_repeats_and_depends_on_its_seed() -> None:
    config = configuration("parity", "linear_attention")
    runs = [Run("parity", "linear_attention", config, 1e-2, seed, 3) for seed in (0, 0, 1)]
    first, again, other = map(train, runs)
    assert (first.loss, first.accuracy) == (again.loss, again.accuracy)
    assert first.loss != other.loss


@pytest.mark.parametrize("claim", CONTRASTS, ids=lambda claim: f"{claim.better}-{claim.worse}-{claim.task}-{claim.length}")
def test_sides_are_trained_alike_and_the_memory_that_is_called_equal_is(claim: object) -> None:
    assert isinstance(claim, type(CONTRASTS[0]))
    assert {claim.better, claim.worse} <= set(TABLE[claim.task]) and claim.length in TASKS[claim.task].test_lengths
    better, worse = (build(configuration(claim.task, name), TASKS[claim.task].vocab_size) for name in (claim.better, claim.worse))
    assert better.config.hidden_size == worse.config.hidden_size and better.config.num_layers == worse.config.num_layers
    if claim.equal_state:
        assert state_bytes(better, 12) == state_bytes(worse, 12)


def row(model: str, task: str, *values: float) -> Row:
    accuracy = dict.fromkeys(TASKS[task].test_lengths, 0.0)
    seeds = {
        seed: Outcome(dict.fromkeys(accuracy, value), value, 0.0, 1, 1, 1, 1.0) for seed, value in enumerate(values)
    }
    return Row(task, model, 1e-2, seeds, {}, 1.0)


@pytest.mark.parametrize(
    "better, worse, held",
    [
        ((0.9, 0.8), (0.7, 0.5), True),
        ((0.9, 0.6), (0.7, 0.5), None),
        ((0.5, 0.5), (0.5, 0.5), False),
        ((0.51, 0.515), (0.5, 0.5), False),
        ((0.3, 0.4), (0.5, 0.6), False),
    ],
)
def test_a_claim_is_seen_only_where_every_seed_shows_it(
    better: tuple[float, ...], worse: tuple[float, ...], held: bool | None
) -> None:
    claim = CONTRASTS[0]
    rows = [row(claim.better, claim.task, *better), row(claim.worse, claim.task, *worse)]
    ((found, *_, verdict),) = [entry for entry in judged(rows) if entry[0] == claim]
    assert found == claim and verdict is held
    assert not judged(rows[:1]), "a claim has two sides"


def test_an_interrupted_table_goes_on_where_it_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "learning.jsonl"
    command = ["evaluate", "learning", "--task", "parity", "--model", "linear_attention", "--steps", "2", "--workers", "1"]
    command += ["--results", str(kept)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "parity" in printed and "chance 50.0 %" in printed and "learning.json" in printed
    lines = kept.read_text().splitlines()
    runs = [json.loads(line)["run"] for line in lines]
    assert len(lines) >= 3 and sum(run["seed"] == 1 for run in runs) == 1
    table = json.loads((tmp_path / "learning.json").read_text())
    (found,) = table["rows"]
    assert found["model"] == "linear_attention" and set(found["seeds"]) == {"0", "1"}
    # The second seed runs at the rate that answered most of the validation set in the sweep.
    assert found["sweep"][str(found["lr"])] == max(found["sweep"].values()) and runs[-1]["lr"] == found["lr"]

    assert main(command) == 0
    assert kept.read_text().splitlines() == lines, "nothing is run twice"
    kept.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:40])  # the write of the last run broke off
    assert main(command) == 0
    *whole, broken, again = kept.read_text().splitlines()
    assert (whole, broken) == (lines[:-1], lines[-1][:40])
    assert {**json.loads(again)["outcome"], "seconds": 0} == {**json.loads(lines[-1])["outcome"], "seconds": 0}
    kept.write_text(kept.read_text().replace(json.loads(again)["fingerprint"], "of another program"))
    assert main(command) == 0
    assert len(kept.read_text().splitlines()) == 2 * len(lines) + 1, "another program's outcomes do not count"


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--task", "sorting"], "'sorting'"),
        (["--model", "gpt"], "'gpt'"),
        (["--task", "parity", "--model", "memmamba"], "memmamba"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--workers", "0"], "--workers is 0"),
        (["--steps", "0"], "--steps is 0"),
    ],
)
def test_mistakes_are_told_in_a_sentence(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "learning", *arguments]) == 2
    assert told in capsys.readouterr().err
