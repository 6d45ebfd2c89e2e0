"""The language model in one process: causality, isolation, streaming by chunks, one-token generation, checkpointing."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from longhaul.models.config import ModelConfig
from longhaul.models.errors import UserError
from longhaul.models.lm import LanguageModel, LossOutput
from longhaul.models.mixers.mamba2 import Mamba2Config
from longhaul.models.sequence import Documents, WholeSequence
from tests.harness.numerics import assert_bitwise_equal, assert_close, assert_trees_close

BOUNDS = (0, 3, 5, 33, 34, 60)
BASE = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    mamba2=Mamba2Config(state_size=6, head_dim=8, num_groups=2, chunk=8),
)
MIXERS = ("linear_attention", "lightning", "retention", "mamba2")


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def model_of(mixer: str, **changes: object) -> LanguageModel:
    return LanguageModel(dataclasses.replace(BASE, linear_mixer=mixer, initializer_range=0.3, **changes))


def tokens_of(length: int) -> Tensor:
    return torch.randint(0, BASE.vocab_size, (length,))


def loss_of(model: LanguageModel, *args: object, **options: object) -> LossOutput:
    out = model(*args, **options)
    assert isinstance(out, LossOutput)
    return out


@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("mixer", MIXERS)
def test_no_token_sees_a_later_one(mixer: str, training: bool) -> None:
    model, tokens = model_of(mixer).train(training), tokens_of(60)
    shard = WholeSequence(Documents((0, 60)))
    before, _ = model(tokens, shard)
    for edited in (1, 31, 59):
        changed = tokens.clone()
        changed[edited] = (changed[edited] + 1) % BASE.vocab_size
        after, _ = model(changed, shard)
        assert_bitwise_equal(after[:edited], before[:edited], f"outputs before token {edited}")
        assert not torch.equal(after[edited:], before[edited:])


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_packed_document_equals_itself_alone(mixer: str) -> None:
    model, tokens = model_of(mixer), tokens_of(60)
    packed, _ = model(tokens, WholeSequence(Documents(BOUNDS)))
    for start, stop in zip(BOUNDS, BOUNDS[1:]):
        alone, _ = model(tokens[start:stop], WholeSequence(Documents((0, stop - start))))
        assert_close(packed[start:stop], alone, f"document {start}..{stop}")


@pytest.mark.parametrize("mixer", MIXERS)
def test_gradients_between_documents_are_zero(mixer: str) -> None:
    model, tokens = model_of(mixer), tokens_of(60)
    embedded = model.embedding(tokens).detach().requires_grad_()
    x, shard = embedded, WholeSequence(Documents(BOUNDS))
    for layer in model.layers:
        x = layer(x, shard).x
    x[5:33].square().sum().backward()
    assert embedded.grad is not None
    assert embedded.grad[:5].abs().max() == 0 and embedded.grad[33:].abs().max() == 0
    assert embedded.grad[5:33].abs().min() > 0


@pytest.mark.parametrize("mixer", MIXERS)
def test_another_document_changes_no_bit(mixer: str) -> None:
    model, tokens = model_of(mixer), tokens_of(60)
    shard = WholeSequence(Documents(BOUNDS))
    changed = tokens.clone()
    changed[5:33] = (changed[5:33] + 7) % BASE.vocab_size
    before, after = model(tokens, shard)[0], model(changed, shard)[0]
    assert_bitwise_equal(after[:5], before[:5], "documents before")
    assert_bitwise_equal(after[33:], before[33:], "documents after")


@pytest.mark.parametrize("cuts", ((0, 20, 40, 60), (0, 1, 34, 35, 60)), ids=("thirds", "uneven"))
@pytest.mark.parametrize("mixer", MIXERS)
def test_chunks_with_state_equal_the_whole(mixer: str, cuts: tuple[int, ...]) -> None:
    model, tokens, whole = model_of(mixer), tokens_of(60), Documents(BOUNDS)
    reference, final = model(tokens, WholeSequence(whole, keep_state=True))
    outputs, state = [], None
    for start, stop in zip(cuts, cuts[1:]):
        inside = [bound - start for bound in BOUNDS if start < bound < stop]
        documents = Documents((0, *inside, stop - start), first_position=whole.position(start))
        hidden, state = model(tokens[start:stop], WholeSequence(documents, keep_state=True), state)
        outputs.append(hidden)
    assert_close(torch.cat(outputs), reference, "outputs")
    for layer, (found, expected) in enumerate(zip(state, final)):
        assert_trees_close(found, expected, f"state of layer {layer}")  # a field may be None


@pytest.mark.parametrize("mixer", MIXERS)
def test_one_token_at_a_time_equals_the_whole(mixer: str) -> None:
    model, tokens = model_of(mixer), tokens_of(30)
    with torch.no_grad():
        reference, _ = model(tokens, WholeSequence(Documents((0, 30))))
        hidden, state = model(tokens[:9], WholeSequence(Documents((0, 9)), keep_state=True))
        outputs = [hidden]
        for position in range(9, 30):
            one = WholeSequence(Documents((0, 1), first_position=position), keep_state=True)
            hidden, state = model(tokens[position : position + 1], one, state)
            outputs.append(hidden)
    assert_close(torch.cat(outputs), reference, "outputs")


@pytest.mark.parametrize("mixer", MIXERS)
def test_recomputed_gradients_are_the_same(mixer: str) -> None:
    model, tokens, labels = model_of(mixer), tokens_of(60), tokens_of(60)
    gradients = []
    for mode in ("none", "full"):
        model.activation_checkpointing = mode
        model.zero_grad()
        loss_of(model, tokens, WholeSequence(Documents(BOUNDS)), labels=labels).loss_sum.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert_bitwise_equal(gradients[1][name], gradient, name)


def test_an_empty_stream_reaches_every_parameter() -> None:
    model = model_of("mamba2")
    out = loss_of(model, tokens_of(0), WholeSequence(Documents((0,))), labels=tokens_of(0))
    out.loss_sum.backward()
    assert out.loss_sum == 0 and out.weight_sum == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() == 0, name


def test_masked_tokens_do_not_count() -> None:
    model, tokens, labels = model_of("lightning"), tokens_of(60), tokens_of(60)
    weights = (torch.arange(60) % 3 > 0).double()
    shard = WholeSequence(Documents(BOUNDS))
    out = loss_of(model, tokens, shard, labels=labels, weights=weights)
    hidden, _ = model(tokens, shard)
    nll = torch.nn.functional.cross_entropy(model.logits(hidden), labels, reduction="none")
    assert_close(out.loss_sum, (nll * weights).sum(), "loss")
    assert out.weight_sum == weights.sum()


def test_letters_of_megatron_stand_alone() -> None:
    model = model_of("mamba2", num_layers=3, pattern="M*-")
    kinds = [(type(layer.mixer).__name__, layer.ffn is not None) for layer in model.layers]
    assert kinds == [("Mamba2", False), ("SoftmaxAttention", False), ("NoneType", True)]
    tokens = tokens_of(60)
    loss_of(model, tokens, WholeSequence(Documents(BOUNDS)), labels=tokens).loss_sum.backward()


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"pattern": "LQ"}, "LQ"),
        ({"linear_mixer": "mamba9"}, "mamba9"),
        ({"hidden_size": 18}, "18"),
        ({"num_kv_heads": 3}, "3"),
        ({"num_layers": 0}, "0"),
    ],
)
def test_nonsense_is_refused_with_its_value(changes: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        dataclasses.replace(BASE, **changes)


def test_flops_count_half_of_a_causal_square() -> None:
    model = model_of("mamba2", num_layers=1, pattern="*")
    weights = sum(p.numel() for p in model.layers[0].mixer.parameters())
    attention = 4 * 16 * 1000 // 2
    assert model.flops_per_token(1000) == 3 * (2 * weights + attention + 2 * BASE.vocab_size * 16)
