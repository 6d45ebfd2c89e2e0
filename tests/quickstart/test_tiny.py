"""Every tiny configuration learns: its held-out loss ends below that of a byte-unigram model on the same documents."""

from pathlib import Path

import pytest

from longhaul.launcher.facts import baselines
from longhaul.launcher.parsing import parse
from longhaul.launcher.trainer import Trainer
from longhaul.parallel.runtime import Runtime

TINY = sorted((Path(__file__).parents[2] / "configs").glob("tiny_*.yaml"))


@pytest.mark.parametrize("path", TINY, ids=lambda path: path.stem)
def test_a_tiny_model_beats_the_unigram(path: Path, tmp_path: Path) -> None:
    short = ["--train.steps", "40", "--data.seq_length", "256", "--data.validation_tokens", "4096"]
    arguments = ["--config", str(path), "--checkpoint.folder", str(tmp_path), "--metrics.tensorboard", "false", *short]
    trainer = Trainer(parse(arguments), Runtime(device="cpu"))
    outcome = trainer.run()
    unigram = baselines(trainer.data)["unigram"]
    assert outcome.held_out_loss is not None and outcome.held_out_loss < unigram - 0.2
