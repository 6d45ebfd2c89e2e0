"""`longhaul bench step`: both sides compute the same, and its processes answer."""

import json
from pathlib import Path

import pytest
import torch

from longhaul.launcher.bench import main
from longhaul.launcher.bench.sides import MODELS, HuggingFace, Ours, Shape, Side, rename
from longhaul.launcher.bench.step import relative_error
from longhaul.models.errors import UserError
from tests.harness.numerics import assert_trees_close

pytest.importorskip("transformers")


def _gradients(side: Side, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = side.forward(tokens)
    loss.backward()
    return loss.detach(), side.named(lambda parameter: parameter.grad)


@pytest.mark.parametrize("model", MODELS)
def test_both_sides_have_the_same_loss_and_gradients(model: str) -> None:
    shape = Shape(model=model, length=70, layers=2, hidden_size=32, state_size=8, head_dim=16, vocab_size=50)
    theirs, ours = HuggingFace(shape), Ours(shape)
    ours.model.load_state_dict(theirs.named(lambda parameter: parameter))
    tokens = shape.tokens()
    (loss, gradients), (their_loss, their_gradients) = _gradients(ours, tokens), _gradients(theirs, tokens)
    assert_trees_close({"loss": loss, **gradients}, {"loss": their_loss, **their_gradients}, model, tolerance=1e-4)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


def test_a_tensor_without_a_counterpart_is_not_passed_over() -> None:
    shape = Shape(model="softmax", layers=1, hidden_size=32, head_dim=16, vocab_size=50)
    tensors = dict(HuggingFace(shape).model.named_parameters())
    with pytest.raises(AssertionError, match=r"new\.bias"):
        rename("softmax", {**tensors, "model.layers.0.new.bias": torch.zeros(1)})


def test_the_error_of_a_gradient() -> None:
    reference = torch.tensor([3.0, 4.0])
    assert relative_error(reference * 1.01, reference) == pytest.approx(0.01, rel=1e-3)
    assert relative_error(torch.tensor([3.0, float("nan")]), reference) == float("inf")


def test_the_command_measures_in_processes_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    arguments = "step --model softmax --peer hf --length 16 --layers 1 --repeats 2 --threads 1 --json"
    assert main([*arguments.split(), str(file)]) == 0
    result = json.loads(file.read_text())
    assert [len(side["steps"]) for side in result["sides"].values()] == [2, 2]
    assert result["gradient_error"] < 1e-4 and result["gradients_compared"] == 9
    assert all(side["peak_gib"] >= side["idle_gib"] > 0.01 for side in result["sides"].values())
    output = capsys.readouterr().out
    assert "Longhaul" in output and "Hugging Face" in output and "speed" in output


def test_one_side_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["step", "--length", "16", "--layers", "1", "--repeats", "1", "--threads", "1"]) == 0
    output = capsys.readouterr().out
    assert "Longhaul" in output and "Hugging Face" not in output


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(UserError, match="--length is 1"):
        main(["step", "--length", "1"])
    with pytest.raises(UserError, match="no benchmark 'stop'"):
        main(["stop"])
