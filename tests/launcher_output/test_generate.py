"""Generation: the same tokens as the full forward would choose, drawn only from where the options allow."""

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from longhaul.launcher import generate
from longhaul.launcher.data.tokenizer import ByteTokenizer
from longhaul.models.config import ModelConfig
from longhaul.models.errors import UserError
from longhaul.models.lm import LanguageModel
from longhaul.models.mixers.mamba2 import Mamba2Config
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import SequenceShard, WholeSequence
from longhaul.models.state import tensor_bytes


def _model(pattern: str = "LN", linear_mixer: str = "mamba2") -> LanguageModel:
    config = ModelConfig(
        vocab_size=264, hidden_size=32, num_layers=len(pattern), pattern=pattern, linear_mixer=linear_mixer, num_heads=2,
        initializer_range=0.3, mamba2=Mamba2Config(state_size=8, head_dim=16, dt_min=1e-4, dt_max=1e-3),
    )  # fmt: skip
    return LanguageModel(config).double()


@pytest.mark.parametrize("mixer", ["mamba2", "linear_attention", "lightning", "retention"])
@pytest.mark.parametrize("length", [1, 11])
def test_greedy_tokens_are_those_of_the_full_forward(mixer: str, length: int) -> None:
    model = _model("LNL", mixer)
    prompt = torch.randint(256, (length,))
    made = generate.generate_ids(model, prompt, tokens=20, temperature=0)
    assert len(made) == 20
    text = torch.cat([prompt, made])
    hidden = model(text, WholeSequence(Documents((0, len(text)))))[0]
    chosen = model.logits(hidden).argmax(-1)
    assert made.tolist() == chosen[length - 1 : -1].tolist()
    assert len(set(made.tolist())) > 3  # a constant answer would prove nothing


def test_the_state_does_not_grow_with_what_is_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = _model("LL"), []
    forward = model.forward

    def recorded(*args: Any) -> Any:
        output: Any = forward(*args)
        sizes.append((len(args[0]), tensor_bytes(output[1])))
        return output

    monkeypatch.setattr(model, "forward", recorded)
    generate.generate_ids(model, torch.arange(9), tokens=5, temperature=0)
    assert [tokens for tokens, _ in sizes] == [9, 1, 1, 1, 1]
    assert len({size for _, size in sizes}) == 1


def test_a_seed_fixes_the_text_and_the_mode_is_kept() -> None:
    model = _model().train()
    texts = [generate.sample(model, ByteTokenizer(), "def ", tokens=30, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert model.training


class _Fixed:
    """A model whose every next token has the same logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        self._logits = logits

    def __call__(self, tokens: torch.Tensor, shard: SequenceShard, state: Any = None) -> tuple[torch.Tensor, Any]:
        return torch.zeros(len(tokens), 1), state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._logits.expand(len(hidden), -1)


def _drawn(probabilities: list[float], tokens: int = 400, **options: Any) -> list[int]:
    model = _Fixed(torch.tensor(probabilities).log())
    options = {"temperature": 1.0, "generator": torch.Generator().manual_seed(0), **options}
    return generate.generate_ids(model, torch.tensor([0]), tokens=tokens, **options).tolist()


def test_the_options_say_what_may_be_drawn() -> None:
    probabilities = [0.05, 0.5, 0.15, 0.3]
    assert set(_drawn(probabilities)) == {0, 1, 2, 3}
    assert set(_drawn(probabilities, top_k=2)) == {1, 3}
    assert set(_drawn(probabilities, top_k=9)) == {0, 1, 2, 3}
    assert set(_drawn(probabilities, top_p=0.7)) == {1, 3}
    assert set(_drawn(probabilities, top_p=0.82)) == {1, 2, 3}
    assert set(_drawn(probabilities, top_p=0.01)) == {1}
    assert set(_drawn(probabilities, temperature=0)) == {1}
    assert set(_drawn(probabilities, vocab_size=1)) == {0}


def test_temperature_is_that_of_the_softmax() -> None:
    share = _drawn([0.2, 0.8], tokens=3000, temperature=2.0).count(0) / 3000
    expected = math.sqrt(0.2) / (math.sqrt(0.2) + math.sqrt(0.8))
    assert abs(share - expected) < 0.03


def test_the_end_of_a_document_ends_the_text() -> None:
    assert _drawn([0.0, 1.0], stop_id=1) == []
    made = _drawn([0.9, 0.1], stop_id=1)
    assert 0 < len(made) < 400 and 1 not in made


def test_padding_rows_of_the_vocabulary_are_never_drawn() -> None:
    class Recording(ByteTokenizer):
        ids: tuple[int, ...] = ()

        def decode(self, ids: Iterable[int]) -> str:
            self.ids += tuple(ids)
            return super().decode(ids)

    model, tokenizer = _model(), Recording()
    with torch.no_grad():
        model.head.weight[tokenizer.vocab_size :] *= 100
    unmasked = generate.generate_ids(model, torch.tensor([97]), tokens=40)
    assert unmasked.max() >= tokenizer.vocab_size
    generate.sample(model, tokenizer, "a", tokens=40, temperature=1.0)
    assert tokenizer.ids and max(tokenizer.ids) < tokenizer.vocab_size


def test_nothing_printed_steers_the_terminal() -> None:
    assert generate.printable("a\tb\nc\x1b[2J\x00\x9b é") == "a\tb\nc\ufffd[2J\ufffd\ufffd é"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"prompt": ""}, "prompt holds no token"),
        ({"tokens": -1}, "--tokens is -1"),
        ({"temperature": -0.5}, "--temperature is -0.5"),
        ({"top_k": 0}, "--top-k is 0"),
        ({"top_p": 1.5}, "--top-p is 1.5"),
    ],
)
def test_impossible_options_are_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate.sample(_model("L"), ByteTokenizer(), **{"prompt": "a", **option})
