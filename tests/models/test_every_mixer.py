"""What every registered mixer offers, held by one table of tests: a new mixer is under them once it is registered."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from longhaul.launcher.generate import generate_ids
from longhaul.launcher.optimizer import undecayed_names
from longhaul.launcher.verify import subjects
from longhaul.models.lm import LanguageModel
from longhaul.models.mixers.registry import MIXERS
from longhaul.models.sequence import Documents, WholeSequence
from longhaul.models.state import state_bytes, tensor_bytes
from tests.harness.numerics import assert_bitwise_equal, assert_close

WIDTH = subjects.WIDTH
every_mixer = pytest.mark.parametrize("name", MIXERS)
# Vectors never decay. Neither do these, though they have two axes or more: decays, what mixes tokens, affine maps of keys, codes,
# and RWKV-7's low-rank gates.
UNDECAYED = {
    "mamba1": {"A_log"},
    "memmamba": {"core.A_log"},
    "s4d": {"log_A_real", "A_imag"},
    "hgrn2": {"lower_bound"},
    "rwkv6": {"mix", "bonus"},
    "rebased": {"weight", "bias"},
    "rwkv7": {"mix", "r_k", *(f"{gate}_{way}.weight" for gate in ("decay", "rate", "gate") for way in ("down", "up"))},
    "paragru": {"input_bias", "recurrent"},
    "paralstm": {"input_bias", "recurrent"},
    "longvq": {"codebook"},
}


@functools.cache
def built(name: str) -> nn.Module:
    """The first layer of three, with the awkward sizes of verify and parameters off their special values."""
    return subjects.prepared(MIXERS[name].build(subjects.config(num_layers=3), 0), subjects.REMEMBER.get(name, {}))


@every_mixer
def test_one_token_at_a_time_in_a_state_of_one_size(name: str) -> None:
    mixer = built(name).double().eval()
    x = torch.randn(30, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = 5  # JRT's prefix is the prompt's
    with torch.no_grad():
        whole, _ = mixer(x, WholeSequence(Documents((0, 30))))
        y, state = mixer(x[:start], WholeSequence(Documents((0, start)), keep_state=True))
        outputs, sizes = [y], [tensor_bytes(state)]
        for position in range(start, 30):
            shard = WholeSequence(Documents((0, 1), first_position=position), keep_state=True)
            y, state = mixer(x[position : position + 1], shard, state)
            outputs.append(y)
            sizes.append(tensor_bytes(state))
    assert_close(torch.cat(outputs), whole, "outputs")
    expected = [state_bytes(mixer, WIDTH, tokens) for tokens in range(start, 31)]
    assert sizes == expected
    assert (len(set(sizes)) == 1) == (name != "attention")
    assert sizes[0] > 0


def test_a_windows_state_stops_growing() -> None:
    mixer = subjects.subject(subjects.WINDOW).make()
    assert [state_bytes(mixer, WIDTH, tokens) for tokens in (1, 8, 9, 100)] == [
        tokens * state_bytes(mixer, WIDTH, 1) for tokens in (1, 8, 8, 8)
    ]


@torch.no_grad()
@pytest.mark.parametrize("window", (None, 9))
def test_keys_and_values_are_not_copied_for_every_token(window: int | None) -> None:
    mixer = (built("attention") if window is None else subjects.subject(subjects.WINDOW).make()).double()
    x = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def one(position: int, row: Tensor, state: Any) -> tuple[Tensor, Any]:
        return mixer(row[None], WholeSequence(Documents((0, 1), first_position=position), keep_state=True), state)

    whole, _ = mixer(x, WholeSequence(Documents((0, 200))))
    _, state = mixer(x[:5], WholeSequence(Documents((0, 5)), keep_state=True))
    places, middle = [], None
    for position in range(5, 200):
        y, state = one(position, x[position], state)
        assert_close(y[0], whole[position], f"token {position}")
        places.append(state.k.untyped_storage().data_ptr())
        middle = state if position == 99 else middle
    moves = sum(a != b for a, b in zip(places, places[1:]))
    assert moves <= (4 if window is None else 5)
    kept = state.k.clone()
    other, branch = one(100, -x[100], middle)
    again, _ = one(101, x[101], branch)
    assert_bitwise_equal(state.k, kept, "the state of the first continuation")
    changed = torch.cat([x[:100], -x[100:101], x[101:102]])
    expected, _ = mixer(changed, WholeSequence(Documents((0, 102))))
    assert_close(torch.cat([other, again]), expected[100:], "another continuation")
    y, _ = one(101, x[101], one(100, x[100], middle)[1])
    assert_close(y[0], whole[101], "the first continuation, after the other")


@every_mixer
def test_text_is_generated_from_it(name: str) -> None:
    pattern, mixer = ("N", "mamba2") if name == "attention" else ("L", name)
    torch.manual_seed(0)
    model = LanguageModel(subjects.config(pattern=pattern, linear_mixer=mixer, initializer_range=0.5)).double().eval()
    prompt = torch.randint(subjects.VOCABULARY, (7,))
    made = generate_ids(model, prompt, tokens=9, temperature=0)
    text = torch.cat([prompt, made])
    with torch.no_grad():
        hidden: Any = model(text, WholeSequence(Documents((0, len(text)))))[0]
    assert made.tolist() == model.logits(hidden).argmax(-1)[6:-1].tolist()


class Kernels(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def kernels(mixer: nn.Module, tokens: int) -> tuple[int, int]:
    """Operations of a forward and of a backward over so many tokens of one document."""
    x = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with Kernels() as forward:
        y = mixer(x, WholeSequence(Documents((0, tokens))))[0]
    with Kernels() as backward:
        y.sum().backward()
    return forward.count, backward.count


# Newton's solver takes C steps of a chunk, all chunks side by side, and then those of the chunks' own recurrence.
NEWTON = ("paragru", "paralstm")


@every_mixer
def test_no_loop_over_tokens(name: str) -> None:
    """Operations grow with chunks, by some each. A loop over tokens adds at least one a token (a row, if it has several)."""
    config = subjects.config(num_layers=3)
    chunked = {}
    for field in dataclasses.fields(config):
        own = getattr(config, field.name)
        if hasattr(own, "chunk"):
            chunked[field.name] = dataclasses.replace(own, chunk=128 if field.name in NEWTON else 64)
    mixer: Any = MIXERS[name].build(dataclasses.replace(config, **chunked), 0)
    mixer.reset_parameters()
    rows = mixer.config.top_k + 1 if name == "mom" else 1
    short, long = kernels(mixer, 512), kernels(mixer, 1024)
    for what, before, after in zip(("forward", "backward"), short, long):
        assert after - before < 512 * rows, f"{what}: {before} operations of 512 tokens, {after} of 1024"


@every_mixer
def test_flops_and_published_initialisation(name: str) -> None:
    mixer: Any = MIXERS[name].build(subjects.config(num_layers=3), 1)
    weights = sum(parameter.numel() for parameter in mixer.parameters() if parameter.ndim >= 2)
    flops = [mixer.flops_per_token(length) for length in (64, 4096)]
    assert flops[0] > 0.5 * weights
    assert (flops[1] > flops[0]) == (name == "attention"), "only softmax attention does more for a token of a longer text"
    with torch.no_grad():
        for tensor in (*mixer.parameters(), *mixer.buffers()):
            tensor.fill_(float("nan"))
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        mixer.reset_parameters()
        found.append({key: tensor.clone() for key, tensor in named_tensors(mixer)})
    for key, tensor in found[0].items():
        assert tensor.isfinite().all(), f"{key} is not initialised"
        assert_bitwise_equal(found[1][key], tensor, key)


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


@every_mixer
def test_weights_decay_and_constants_do_not(name: str) -> None:
    mixer = MIXERS[name].build(subjects.config(num_layers=3), 1)
    matrices = {key for key, parameter in mixer.named_parameters() if parameter.ndim >= 2}
    vectors = {key for key, parameter in mixer.named_parameters() if parameter.ndim < 2}
    assert undecayed_names(mixer) == vectors | UNDECAYED.get(name, set())
    assert matrices - undecayed_names(mixer), "weights decay"
