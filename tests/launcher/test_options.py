"""Options that change how a step is computed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from longhaul.launcher.trainer import Trainer
from longhaul.models.errors import UserError
from longhaul.parallel.runtime import Runtime
from tests.harness import run_ranks

from .runs import tiny, train_rank, write_corpus


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus")
    return tmp_path


def trained(folder: Path, name: str, **sections: Any) -> tuple[float, dict[str, torch.Tensor]]:
    outcome, parameters = train_rank(0, 1, tiny(folder, checkpoint={"folder": str(folder / name)}, **sections))
    assert outcome.held_out_loss is not None
    return outcome.held_out_loss, parameters


def test_bf16_computes_products_in_bf16(folder: Path) -> None:
    loss, exact = trained(folder, "fp32")
    rough_loss, rough = trained(folder, "bf16", train={"precision": "bf16"})
    assert all(parameter.dtype == torch.float32 for parameter in rough.values())
    assert rough_loss == pytest.approx(loss, rel=0.02)
    assert rough_loss != loss
    assert any(not torch.equal(exact[name], rough[name]) for name in exact)


@pytest.mark.parametrize("mode, offload", [("full", False), ("selective", True)])
def test_recomputation_changes_nothing(mode: str, offload: bool, folder: Path) -> None:
    loss, exact = trained(folder, "kept")
    options = {"activation_checkpointing": mode, "activation_offload": offload}
    again, recomputed = trained(folder, "recomputed", train=options)
    assert again == pytest.approx(loss, rel=1e-6)
    for name in exact:
        torch.testing.assert_close(recomputed[name], exact[name])


def test_what_a_machine_cannot_do_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"train\.precision fp8 needs a GPU"):
        Trainer(tiny(folder, train={"precision": "fp8"}), Runtime(device="cpu"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"train\.compile needs a C\+\+ compiler"):
        Trainer(tiny(folder, train={"compile": True}), Runtime(device="cpu"))


def test_seeds_give_other_weights(folder: Path) -> None:
    first, second = (
        Trainer(tiny(folder, train={"seed": seed}, checkpoint={"every": 0}), Runtime(device="cpu")).model.model for seed in (1, 2)
    )
    assert not torch.equal(first.embedding.weight, second.embedding.weight)


def test_deterministic(folder: Path) -> None:
    try:
        Trainer(tiny(folder, train={"deterministic": True}), Runtime(device="cpu"))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_vocabulary_that_is_too_small(folder: Path) -> None:
    with pytest.raises(UserError, match=r"model\.vocab_size 200 is smaller than the tokenizer's 257"):
        Trainer(tiny(folder, model={"vocab_size": 200}), Runtime(device="cpu"))


def test_a_folder_that_cannot_be(folder: Path) -> None:
    (folder / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot make checkpoint\.folder"):
        Trainer(tiny(folder, checkpoint={"folder": str(folder / "file" / "run")}), Runtime(device="cpu"))


def gathered_in(rank: int, world_size: int, config: Any) -> dict[str, Any]:
    """Types of a weight inside a forward, of the weight that is trained, and of what its gradient was summed in."""
    trainer = Trainer(config, Runtime(rank, world_size, device="cpu"))
    seen: dict[str, Any] = {}
    block = trainer.model.model.layers[0]
    # Of a child: hooks of the block itself run before parameters are there and after they are gone.
    child = next(m for m in block.modules() if m is not block and list(m.parameters(recurse=False)))
    child.register_forward_pre_hook(lambda module, inputs: seen.update(inside=next(module.parameters()).dtype))
    trainer.stepper.optimizer.register_step_pre_hook(
        lambda *_: seen.update(gradient=next(block.parameters()).grad.dtype, trained=next(block.parameters()).dtype)
    )
    loss = trainer.run().held_out_loss
    return {**seen, "loss": loss}


def test_parameters_gathered_in_bf16(folder: Path) -> None:
    def config(dtype: str) -> Any:
        parallel = {"parameter_dtype": dtype}
        checkpoint = {"every": 0, "folder": str(folder / dtype)}
        return tiny(folder, parallel=parallel, checkpoint=checkpoint, train={"precision": "bf16", "global_batch_size": 4})

    exact, rough = (run_ranks(gathered_in, 2, config=config(dtype))[0] for dtype in ("fp32", "bf16"))
    assert (exact["inside"], rough["inside"]) == (torch.float32, torch.bfloat16)
    assert rough["gradient"] == rough["trained"] == torch.float32
    assert rough["loss"] == pytest.approx(exact["loss"], rel=0.02)


def test_compiled_modules_keep_their_names_and_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longhaul.launcher.build.check_compiler", lambda device: None)  # nothing compiles before a forward
    plain, compiled = (
        Trainer(tiny(folder, train={"compile": asked}, checkpoint={"every": 0}), Runtime(device="cpu")).model.model
        for asked in (False, True)
    )
    assert any(module._compiled_call_impl is not None for module in compiled.modules())
    expected, found = plain.state_dict(), compiled.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
