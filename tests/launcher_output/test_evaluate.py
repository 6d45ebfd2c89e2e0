"""`longhaul evaluate memory`: probes against known answers, fidelities of models whose answer is known, the command."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from longhaul.launcher.cli import main
from longhaul.launcher.evaluate.memory import RESULT, hidden_states, memory_fidelity
from longhaul.launcher.evaluate.probe import Probe
from longhaul.models.block import BlockOutput
from longhaul.models.config import ModelConfig
from longhaul.models.lm import LanguageModel
from longhaul.models.sequence import WholeSequence
from tests.harness.pool import run_ranks
from tests.launcher.runs import tiny, train_rank, write_corpus

WIDTH = 6


def test_a_probe_reads_what_is_there_and_nothing_else(generator: torch.Generator) -> None:
    x, noise = (torch.randn(4000, WIDTH, generator=generator) for _ in range(2))
    linear = x @ torch.randn(WIDTH, WIDTH, generator=generator) + 5
    half = torch.cat([x[:, :3], noise[:, 3:]], dim=1)
    for y, low, high in ((linear, 0.999, 1.0), (noise + 5, -0.05, 0.05), (half, 0.6, 0.8)):
        probe = Probe(WIDTH)
        assert probe.fidelity is None
        for rows in (slice(0, 1000), slice(1000, 3000)):
            probe.fit(x[rows], y[rows])
        probe.judge(x[3000:], y[3000:])
        assert probe.fidelity is not None
        assert low <= probe.fidelity <= high
    # Half of independent entries known: the cosine is the root of the known share of the square, on average.
    assert abs(probe.fidelity - 0.5**0.5) < 0.05


def test_a_probe_is_the_ridge_solution(generator: torch.Generator) -> None:
    x, y = (torch.randn(50, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    probe = Probe(WIDTH, ridge=0.3)
    probe.fit(x, y)
    probe.judge(x, y)
    centred, target = x - x.mean(0), y - y.mean(0)
    penalty = 0.3 * centred.square().sum(0).mean()
    weight = torch.linalg.solve(centred.T @ centred + penalty * torch.eye(WIDTH, dtype=x.dtype), centred.T @ target)
    expected = torch.cosine_similarity(centred @ weight, target, dim=-1).mean().item()
    assert probe.fidelity == pytest.approx(expected, rel=1e-9)


def test_layers_that_change_nothing_keep_layers_and_forget_tokens(generator: torch.Generator) -> None:
    model = LanguageModel(ModelConfig(vocab_size=40, hidden_size=8, num_layers=3, num_heads=2, pattern="-"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "down" in name or name.endswith("out.weight"):
                parameter.zero_()
    documents = [torch.randint(40, (length,), generator=generator) for length in (900, 900, 3, 700)]
    states = hidden_states(model, documents[0])
    assert len(states) == 4 and torch.equal(states[0], states[3]), "the blocks were to change nothing"
    result = memory_fidelity(model, documents, distances=(1, 5, 1000), gaps=(1, 3, 4))
    assert set(result["layer"]) == {1, 3} and set(result["layer"][1]) == {0, 1, 2} and set(result["layer"][3]) == {0}
    assert all(value > 0.999 for value in result["eclmf"].values())
    assert all(abs(result["etmf"][d]) < 0.1 for d in (1, 5))
    assert result["etmf"][1000] is None


class Delays(nn.Module):
    """One block that adds to each token the one four before it."""

    def __init__(self) -> None:
        super().__init__()
        self.config = ModelConfig(vocab_size=300, hidden_size=16, num_layers=1)
        self.embedding = nn.Embedding(300, 16)
        self.layers = nn.ModuleList([nn.Identity()])

    def forward(self, tokens: torch.Tensor, shard: WholeSequence) -> None:
        x = self.embedding(tokens)
        self.layers[0](BlockOutput(x + torch.cat([torch.zeros(4, 16), x[:-4]]), None, None, None))


def test_a_token_is_read_at_the_distance_to_which_it_was_carried(generator: torch.Generator) -> None:
    documents = [torch.randint(300, (1500,), generator=generator) for _ in range(4)]
    result = memory_fidelity(Delays(), documents, distances=(1, 4, 5), gaps=(1,))
    assert abs(result["etmf"][4] - 0.5**0.5) < 0.03  # one of two equal parts
    assert abs(result["etmf"][1]) < 0.05 and abs(result["etmf"][5]) < 0.05
    assert abs(result["eclmf"][1] - 0.5**0.5) < 0.03


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path / "corpus")
    model = {"linear_mixer": "memmamba", "num_layers": 2, "pattern": "LN"}
    config = tiny(tmp_path, model=model, train={"steps": 1})
    run_ranks(train_rank, 1, config=config, timeout=120)
    folder = tmp_path / "run"
    assert main(["evaluate", "memory", str(folder), "--distances", "1", "4", "--gaps", "1", "--length", "60"]) == 0
    printed = capsys.readouterr().out
    assert "ETMF" in printed and "ECLMF" in printed and RESULT in printed
    result = json.loads((folder / RESULT).read_text())
    assert set(result["token"]) == {"1", "4"} and set(result["layer"]["1"]) == {"0", "1"}
    assert result["documents"] >= 2 and -1 <= result["etmf"]["1"] <= 1

    assert main(["evaluate", "memory", str(folder), "--distances", "0"]) == 2
    assert "--distances holds 0" in capsys.readouterr().err
    assert main(["evaluate", "remembrance"]) == 2
    assert "'remembrance'" in capsys.readouterr().err
    assert main(["evaluate", "memory", str(tmp_path)]) == 2
