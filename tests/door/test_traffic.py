"""Laws 3.3 and 4: what crosses the wire, when, and that recomputation sends nothing."""

import pytest
import torch
import torch.distributed as dist

from longhaul.models.config import ModelConfig
from longhaul.models.lm import LanguageModel
from longhaul.models.mixers.mamba2 import Mamba2Config
from longhaul.models.ops.segments import Documents
from longhaul.parallel.comm import Comm
from longhaul.parallel.layout import SequenceLayout
from tests.harness.pool import run_ranks

from .ranks import WIDTH, make_module, make_shard

HEADS, KV_HEADS, HEAD_DIM = 4, 2, WIDTH // 4


def step(module: torch.nn.Module, comm: Comm, num_tokens: int, bounds: tuple[int, ...]) -> None:
    """Forward and backward of a mixer on this rank's part."""
    layout = SequenceLayout.contiguous(num_tokens, comm.size)
    shard = make_shard(comm, layout, Documents(bounds))
    x = torch.randn(shard.num_tokens, WIDTH, requires_grad=True)
    module(x, shard)[0].square().sum().backward()


def traffic(rank: int, world_size: int, mixer: str, num_tokens: int, bounds: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    """(messages, bytes) received by label."""
    comm = Comm(dist.group.WORLD)
    step(make_module(mixer, torch.float32), comm, num_tokens, bounds)
    return {label: (count.messages, count.bytes) for (label, _), count in comm.ledger.counts.items()}


@pytest.mark.parametrize("world_size", (2, 3, 4))
@pytest.mark.parametrize("mixer", ("linear_attention", "lightning", "retention", "mamba2"))
def test_state_traffic_is_the_formula_and_does_not_grow(mixer: str, world_size: int) -> None:
    peers, float32 = world_size - 1, 4
    if mixer == "mamba2":
        heads, width_k, width_v = 4, 6, 8
        state = heads * width_k * width_v + heads  # and the log decay
    else:
        state = HEADS * HEAD_DIM * (HEAD_DIM + (mixer == "linear_attention"))  # and the normaliser's column
    expected = dict.fromkeys(("state forward", "state backward"), (peers, peers * state * float32))
    if mixer == "mamba2":
        halo = 3 * (32 + 2 * 2 * 6)  # taps - 1 tokens of x, B and C
        expected |= dict.fromkeys(("halo forward", "halo backward"), (peers, peers * halo * float32))
    for length in (64, 128):
        for found in run_ranks(traffic, world_size, mixer=mixer, num_tokens=length, bounds=(0, length)):
            assert found == expected


@pytest.mark.parametrize("world_size", (2, 3, 4))
def test_key_value_traffic_is_the_formula(world_size: int) -> None:
    peers, float32 = world_size - 1, 4
    for length in (61, 122):
        most = -(-length // world_size)
        size = peers * most * KV_HEADS * 2 * HEAD_DIM * float32
        for found in run_ranks(traffic, world_size, mixer="attention", num_tokens=length, bounds=(0, length)):
            gathered = {label: value for label, value in found.items() if label == "kv forward"}
            assert gathered == {"kv forward": (peers, size)}
            assert found["kv backward"] == (peers, size)


def both_kinds(rank: int, world_size: int) -> list[tuple[str, int]]:
    comm = Comm(dist.group.WORLD)
    step(make_module("attention", torch.float32), comm, 64, (0, 64))
    return sorted((kind, count.bytes) for (label, kind), count in comm.ledger.counts.items() if label == "kv backward")


def test_the_backward_gathers_again_and_scatters_once() -> None:
    size = 32 * KV_HEADS * 2 * HEAD_DIM * 4
    for found in run_ranks(both_kinds, 2):
        assert found == [("all_gather", size), ("reduce_scatter", size)]


@pytest.mark.parametrize("mixer", ("lightning", "attention"))
def test_nothing_is_sent_where_no_document_crosses(mixer: str) -> None:
    for found in run_ranks(traffic, 2, mixer=mixer, num_tokens=64, bounds=(0, 5, 32, 64)):
        assert found == {}


def events(rank: int, world_size: int, mixer: str) -> list[str]:
    comm = Comm(dist.group.WORLD)
    comm.ledger.events = []
    step(make_module(mixer, torch.float32), comm, 64, (0, 64))
    return [event for event in comm.ledger.events if "halo" not in event]


@pytest.mark.parametrize("mixer", ("mamba2", "lightning"))
def test_messages_are_under_way_beside_local_work(mixer: str) -> None:
    for found in run_ranks(events, 3, mixer=mixer):
        assert found == [
            *("post state forward", "local start", "local end", "wait state forward"),
            *("post state backward", "local start", "local end", "wait state backward"),
        ]


def test_keys_travel_beside_attention_to_own_keys() -> None:
    for found in run_ranks(events, 3, mixer="attention"):
        assert found[:4] == ["post kv forward", "local start", "local end", "wait kv forward"]
        assert found[4:8] == ["post kv backward", "local start", "local end", "wait kv backward"]


CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=WIDTH,
    num_layers=4,
    num_heads=HEADS,
    mamba2=Mamba2Config(state_size=6, head_dim=8, chunk=8),
)


def recomputation(rank: int, world_size: int, mode: str) -> dict[str, object]:
    """Messages of the forward and of the backward, by label, and the gradients."""
    torch.manual_seed(0)
    model, comm = LanguageModel(CONFIG), Comm(dist.group.WORLD)
    model.activation_checkpointing = mode
    layout = SequenceLayout.contiguous(63, world_size)
    shard = make_shard(comm, layout, Documents((0, 3, 50, 63)))
    tokens = torch.arange(63)[slice(*layout.parts[rank][0])] % 40
    loss = model(tokens, shard, labels=tokens).loss_sum
    counts = []
    for run in (lambda: None, loss.backward):
        run()
        counts.append({label: count.messages for (label, _), count in comm.ledger.counts.items()})
        comm.ledger.reset()
    return {"counts": counts, "grads": {name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize("world_size", (2, 3))
def test_recomputation_sends_nothing(world_size: int) -> None:
    plain, full = (run_ranks(recomputation, world_size, mode=mode) for mode in ("none", "full"))
    for without, checkpointed in zip(plain, full):
        assert checkpointed["counts"] == without["counts"]
        backward = checkpointed["counts"][1]
        assert backward and not any(label.endswith("forward") for label in backward)
        for name, gradient in without["grads"].items():
            assert torch.equal(checkpointed["grads"][name], gradient), name
