"""Streaming in one process: gradients of chunks are those of the whole stream, and borders cost what the docs say."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from longhaul.models.borders import Borders
from longhaul.models.config import LINEAR_MIXERS, ModelConfig
from longhaul.models.encoder import Encoder, EncoderConfig
from longhaul.models.errors import UserError
from longhaul.models.lm import LanguageModel
from longhaul.models.mixers.attention import AttentionConfig
from longhaul.models.mixers.mamba2 import Mamba2Config
from longhaul.models.moe import MoEConfig
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import KVState, SequenceShard, WholeSequence
from longhaul.models.streaming import LongStream, Streamed, Streaming, check_streamable, chunks_of
from tests.harness.numerics import assert_close, assert_trees_close

LENGTH, CHUNK, SCALE = 23, 6, 0.37
# Documents within a chunk, over one border, over several, and one that ends at a border (12).
BOUNDS = (0, 3, 5, 12, 13, 23)
CONFIG = ModelConfig(
    vocab_size=20,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    pattern="L",
    mamba2=Mamba2Config(state_size=6, head_dim=8, num_groups=2, chunk=8),
)


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def model_of(**changes: Any) -> LanguageModel:
    """No parameter at a value that hides an error, and gates that remember, so that what a border hands over matters."""
    torch.manual_seed(0)
    model = LanguageModel(dataclasses.replace(CONFIG, initializer_range=0.3, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if name.endswith("A_log"):
                parameter.uniform_(-6, -4)
    return model


def streamable(mixer: str) -> Any:
    """Its options; Newton's method ends in the same states if it is let to converge."""
    options = getattr(CONFIG, mixer)
    wanted = {"balance_weight": 0.3, "iterations": 10}
    return dataclasses.replace(options, **{name: value for name, value in wanted.items() if hasattr(options, name)})


def stream_of(bounds: tuple[int, ...] = BOUNDS, first_position: int = 0) -> LongStream:
    generator = torch.Generator().manual_seed(1)
    length = bounds[-1]
    tokens, labels = torch.randint(0, CONFIG.vocab_size, (2, length), generator=generator)
    weights = (torch.rand(length, generator=generator) < 0.7).double()
    return LongStream(tokens, labels, weights, Documents(bounds, first_position))


def whole_shard(documents: Documents, keep_state: bool) -> SequenceShard:
    return WholeSequence(documents, keep_state=keep_state)


def gradients_of(model: nn.Module) -> dict[str, Tensor | None]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def state_before(model: LanguageModel, tokens: int = 7) -> Any:
    """What a document's first tokens leave behind."""
    with torch.no_grad():
        return model(torch.arange(tokens), WholeSequence(Documents((0, tokens)), keep_state=True))[1]


def reference(model: LanguageModel, stream: LongStream, state: Any = None, keep_state: bool = False) -> dict[str, Any]:
    """The whole stream at once."""
    state = tree_map(lambda leaf: leaf if leaf is None else leaf.clone().requires_grad_(), state)
    shard = WholeSequence(stream.documents, keep_state=keep_state)
    out = model(stream.tokens, shard, state, labels=stream.labels, weights=stream.weights)
    (out.loss_sum * SCALE).backward()
    gradient = tree_map(lambda leaf: leaf if leaf is None else leaf.grad, state)
    loss = out.loss_sum.detach() - (0 if out.aux_sum is None else out.aux_sum)
    found = {"loss": loss, "weight": out.weight_sum.detach(), "gradients": gradients_of(model)}
    return {**found, "state": tree_map(lambda leaf: leaf if leaf is None else leaf.detach(), out.state), "dstate": gradient}


def streamed(
    model: LanguageModel, stream: LongStream, state: Any = None, keep_state: bool = False, chunk: int = CHUNK, **options: Any
) -> tuple[dict[str, Any], Streamed]:
    out = Streaming(model, chunk, whole_shard, **options).backward(stream, state, scale=SCALE, keep_state=keep_state)
    found = {"loss": out.loss_sum, "weight": out.weight_sum, "gradients": gradients_of(model)}
    return {**found, "state": out.state, "dstate": out.state_gradient}, out


@pytest.mark.parametrize("mixer", LINEAR_MIXERS)
def test_gradients_are_those_of_the_whole_stream(mixer: str) -> None:
    model = model_of(linear_mixer=mixer, **{mixer: streamable(mixer)})
    for bounds in (BOUNDS, (0, LENGTH)):
        stream, state = stream_of(bounds, 7), state_before(model)
        expected = reference(model, stream, state, keep_state=True)
        found, _ = streamed(model, stream, state, keep_state=True)
        assert_trees_close(found, expected, f"{bounds}")


@pytest.mark.parametrize("window", (None, 4, 9), ids=("full", "shorter than a chunk", "longer than a chunk"))
def test_hybrids_hand_back_gradients_of_keys_and_values(window: int | None) -> None:
    model = model_of(pattern="LN", linear_mixer="mamba2", attention=AttentionConfig(window=window))
    for bounds, keep in ((BOUNDS, "all"), ((0, LENGTH), "two_level")):
        stream, state = stream_of(bounds, 7), state_before(model)
        expected = reference(model, stream, state, keep_state=True)
        found, _ = streamed(model, stream, state, keep_state=True, keep=keep)
        assert_trees_close(found, expected, f"{bounds}, {keep}")


@pytest.mark.parametrize(
    "keep, every, activation_checkpointing",
    [
        ("two_level", None, "full"),
        ("two_level", 1, "none"),
        ("two_level", 3, "selective"),
        ("cpu", None, "none"),
        ("disk", None, "full"),
    ],
)
def test_where_borders_wait_changes_nothing(
    keep: str, every: int | None, activation_checkpointing: str, tmp_path: Path
) -> None:
    model, stream = model_of(pattern="LN", linear_mixer="gated_deltanet"), stream_of()
    expected, _ = streamed(model, stream, chunk=2)
    model.activation_checkpointing = activation_checkpointing
    found, _ = streamed(model, stream, chunk=2, keep=keep, every=every, folder=tmp_path)
    assert_trees_close(found, expected, keep)
    assert not list(tmp_path.iterdir()), "border files are gone after the step"


@pytest.mark.parametrize("chunk", (1, 22, 23, 100))
def test_any_chunk_length(chunk: int) -> None:
    model, stream = model_of(linear_mixer="mamba2"), stream_of((0, LENGTH))
    found, _ = streamed(model, stream, chunk=chunk)
    assert_trees_close(found, reference(model, stream), f"chunks of {chunk}")


def test_an_empty_stream_reaches_every_parameter() -> None:
    model = model_of(linear_mixer="mamba2")
    found, _ = streamed(model, stream_of((0,)))
    assert found["loss"] == 0 and found["weight"] == 0
    for name, gradient in found["gradients"].items():
        assert gradient is not None and gradient.abs().max() == 0, name


def test_truncated_has_the_loss_and_no_gradient_over_borders() -> None:
    model, stream = model_of(linear_mixer="mamba2"), stream_of((0, LENGTH))
    found, out = streamed(model, stream, truncate=True)
    expected = reference(model, stream)
    assert_close(found["loss"], expected["loss"], "loss")
    assert out.border_elements == 0
    state: Any = None
    for chunk in chunks_of(stream.documents, CHUNK):
        part = slice(chunk.start, chunk.stop)
        options = {"labels": stream.labels[part], "weights": stream.weights[part]}
        output = model(stream.tokens[part], whole_shard(chunk.documents, True), state, **options)
        (output.loss_sum * SCALE).backward()
        state = tree_map(Tensor.detach, output.state)
    assert_trees_close(found["gradients"], gradients_of(model), "truncated gradients")


def test_evaluation_by_chunks_has_the_loss_of_the_whole() -> None:
    model, stream = model_of(pattern="LN", linear_mixer="gla"), stream_of(BOUNDS, 7)
    state = state_before(model)
    out = Streaming(model, CHUNK, whole_shard).evaluate(stream, state, keep_state=True)
    expected = reference(model, stream, state, keep_state=True)
    assert_close(out.loss_sum, expected["loss"], "loss")
    assert_trees_close(out.state, expected["state"], "state")


@pytest.mark.parametrize("n", (1, 2, 9, 10, 17))
def test_kept_elements_follow_the_formula(n: int) -> None:
    """docs/streaming.md: `all` keeps n - 1 states, `two_level` at most (ceil(n / k) - 1) + (k - 1) of them."""
    model, C = model_of(linear_mixer="mamba2"), 2
    one = sum(leaf.numel() for leaf in tree_leaves(state_before(model)))
    stream = stream_of((0, C * n))
    assert streamed(model, stream, chunk=C)[1].border_elements == (n - 1) * one
    for every in (None, 3):
        k = math.isqrt(n - 1) + 1 if every is None else every
        blocks = -(-n // k)
        kept = max(blocks - 1 + (n - 1) % k, max(blocks - 2, 0) + (k - 1) if blocks > 1 else 0)
        found = streamed(model, stream, chunk=C, keep="two_level", every=every)[1].border_elements
        assert found == kept * one
        assert kept <= blocks - 1 + k - 1


def test_a_window_is_of_constant_size_and_full_attention_keeps_each_key_once() -> None:
    C, n, width = 4, 8, 2 * 16  # keys and values of a token of one layer
    stream = stream_of((0, C * n))
    full = streamed(model_of(pattern="N", num_layers=1), stream, chunk=C)[1].border_elements
    assert full == (n - 1) * C * width
    window = streamed(
        model_of(pattern="N", num_layers=1, attention=AttentionConfig(window=C + 1)), stream, chunk=C
    )[1].border_elements
    assert window == (n - 1) * C * width
    two = streamed(
        model_of(pattern="N", num_layers=1, attention=AttentionConfig(window=3)), stream, chunk=C, keep="two_level", every=3
    )[1].border_elements
    assert two == 3 * 2 * width


def test_a_stack_gives_back_what_grew_shrank_and_began_anew(tmp_path: Path) -> None:
    keys = torch.arange(20.0).reshape(20, 1, 1)
    # (token, first key, last key): grows twice, slides, grows by other than the tokens in between, grows again.
    states = [(4, 0, 4), (8, 0, 8), (9, 0, 9), (13, 3, 13), (15, 14, 15), (18, 14, 18)]
    for keep in ("all", "disk"):
        with Borders(keep, tmp_path) as borders:
            for index, (token, a, b) in enumerate(states):
                borders.push(index, token, (KVState(keys[a:b], -keys[a:b]), None))
            assert borders.elements == 2 * (4 + 4 + 1 + 10 + 1 + 3)
            for index, (_, a, b) in reversed(list(enumerate(states))):
                assert borders.index == index
                kv, nothing = borders.pop()
                assert nothing is None and torch.equal(kv.k, keys[a:b]) and torch.equal(kv.v, -keys[a:b])
            assert borders.elements == 0


def test_chunks_know_what_crosses_their_borders() -> None:
    chunks = chunks_of(Documents(BOUNDS, 7), CHUNK)
    assert [(chunk.start, chunk.stop, chunk.goes_on) for chunk in chunks] == [
        (0, 6, True), (6, 12, False), (12, 18, True), (18, 23, False)
    ]  # fmt: skip
    assert [chunk.documents.bounds for chunk in chunks] == [(0, 3, 5, 6), (0, 6), (0, 1, 6), (0, 5)]
    assert [chunk.documents.first_position for chunk in chunks] == [7, 1, 0, 5]


def test_models_that_look_both_ways_are_refused() -> None:
    with pytest.raises(UserError, match="both ways"):
        check_streamable(Encoder(EncoderConfig(vocab_size=20, hidden_size=16, num_layers=1, num_heads=2)))
    with pytest.raises(UserError, match="JRT"):
        check_streamable(model_of(linear_mixer="jrt"))


@pytest.mark.parametrize("keep, activation_checkpointing", [("all", "none"), ("two_level", "full"), ("disk", "selective")])
def test_losses_over_documents_are_those_of_whole_documents(keep: str, activation_checkpointing: str) -> None:
    experts = MoEConfig(num_experts=3, expert_hidden_size=4, balance_weight=0.5, z_weight=0.2)
    model = model_of(ffn="moe", moe=experts, pattern="LN", linear_mixer="mom", mom=streamable("mom"))
    model.activation_checkpointing = activation_checkpointing
    check_streamable(model)
    for first_position, chunks in ((0, (CHUNK, LENGTH)), (7, (2,))):
        stream, state = stream_of(first_position=first_position), state_before(model) if first_position else None
        expected = reference(model, stream, state, keep_state=True)
        for chunk in chunks:
            found, _ = streamed(model, stream, state, keep_state=True, chunk=chunk, keep=keep)
            assert_trees_close(found, expected, f"chunks of {chunk} from {first_position}")


@pytest.mark.parametrize(
    "options, named", [({"chunk_tokens": 0}, "0"), ({"keep": "gpu"}, "gpu"), ({"every": 2}, "2")]
)
def test_nonsense_is_refused_with_its_value(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Streaming(**{"model": nn.Identity(), "chunk_tokens": 4, "make_shard": whole_shard, **options})
