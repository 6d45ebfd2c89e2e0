"""The main job as a person starts it: torchrun, two processes, the shipped configuration."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "launcher/train.py"]
    return subprocess.run(
        [*command, "--config", "configs/quickstart.yaml", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_two_processes_train_and_report(tmp_path: Path) -> None:
    short = ["--train.steps", "3", "--data.seq_length", "300", "--data.validation_tokens", "600"]
    done = torchrun(*short, "--checkpoint.folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for name in ("report.html", "sample.txt", "metrics.jsonl", "resolved_config.yaml", "step_3", "LATEST"):
        assert (tmp_path / name).exists() and name in done.stdout + "LATEST", name
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss_metrics/global_avg_loss"] for step in steps if "loss_metrics/global_avg_loss" in step]
    assert len(losses) == 3 and losses[2] < losses[0]
    assert all(step["communication/received(MiB)"] > 0 for step in steps if "grad_norm" in step)


def test_an_unknown_key_is_one_sentence(tmp_path: Path) -> None:
    failed = torchrun("--train.stepz", "3", "--checkpoint.folder", str(tmp_path / "run"))
    assert failed.returncode != 0
    sentences = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1 and "stepz" in sentences[0] and "train.steps" in sentences[0]
    assert not (tmp_path / "run").exists()
