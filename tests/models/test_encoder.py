"""The bidirectional encoder: it looks both ways and stays inside documents, learns, and is the same on any number of ranks."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longhaul.launcher.verify.exactness import error
from longhaul.models.bidirectional import BidirectionalAttention, BidirectionalLinearAttention, LinformerAttention
from longhaul.models.encoder import MIXERS, Encoder, EncoderConfig, MaskedTokens, mask_tokens
from longhaul.models.errors import UserError
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import SequenceShard, WholeSequence
from longhaul.parallel.attention.registry import make_attention
from longhaul.parallel.comm import Comm
from longhaul.parallel.exchange.all_gather import AllGather
from longhaul.parallel.layout import LAYOUTS, SequenceLayout
from longhaul.parallel.shard import RankShard
from tests.harness.cases import document_tables
from tests.harness.numerics import TOLERANCE, assert_bitwise_equal, assert_close
from tests.harness.pool import run_ranks

T, VOCABULARY, MASK = 37, 24, 23


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_encoder(mixer: str, **changes: Any) -> Encoder:
    torch.manual_seed(0)
    options = {"num_layers": 2, "max_positions": T, "projected": 3, "initializer_range": 0.3} | changes
    return Encoder(EncoderConfig(vocab_size=VOCABULARY, hidden_size=16, ffn_hidden_size=24, mixer=mixer, **options)).double()


def make_batch(length: int = T) -> MaskedTokens:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, MASK, (length,), generator=generator)
    return mask_tokens(tokens, MASK, MASK, 0.4, generator)


@pytest.mark.parametrize("mixer", MIXERS)
def test_reads_its_whole_document_and_no_other(mixer: str) -> None:
    encoder, tokens = make_encoder(mixer), make_batch().tokens
    shard = WholeSequence(Documents((0, 10, 11, T)))
    before = encoder(tokens, shard)
    for edited, (start, stop) in ((4, (0, 10)), (10, (10, 11)), (T - 1, (11, T))):
        changed = tokens.clone()
        changed[edited] = (changed[edited] + 1) % VOCABULARY
        after = encoder(changed, shard)
        assert ((after - before)[start:stop].abs().amax(1) > 1e-6).all(), "every token of the document sees the change"
        for a, b in ((0, start), (stop, T)):
            assert_bitwise_equal(after[a:b], before[a:b], f"tokens {a} to {b}")


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_document_alone(mixer: str) -> None:
    encoder, tokens = make_encoder(mixer), make_batch().tokens
    packed = encoder(tokens, WholeSequence(Documents((0, 10, T))))
    assert_close(encoder(tokens[10:], WholeSequence(Documents((0, T - 10)))), packed[10:], "second document")


def test_linear_attention_token_by_token() -> None:
    """Every token reads the sum of all tokens' outer products."""
    mixer = BidirectionalLinearAttention(8, 2).double()
    mixer.reset_parameters()
    q, k, v = torch.randn(3, 7, 2, 4).unbind(0)
    out = mixer.mix(q, k, v, WholeSequence(Documents((0, 7))))

    def turned(x: Tensor, position: int) -> Tensor:
        angle = position * 10000.0 ** -torch.tensor([0.0, 0.5])
        a, b = (torch.nn.functional.elu(x) + 1).chunk(2, dim=-1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)

    for head, t in itertools.product(range(2), range(7)):
        read = sum((turned(q[t, head], t) @ turned(k[s, head], s)) * v[s, head] for s in range(7))
        assert_close(out[t, head], read / (read.square().mean() + 1e-5).sqrt(), f"head {head}, token {t}")


def test_linformer_with_every_token_its_own_projection_is_attention() -> None:
    mixer = LinformerAttention(8, 2, max_positions=7, projected=7).double()
    with torch.no_grad():
        mixer.key_projection.copy_(torch.eye(7))
        mixer.value_projection.copy_(torch.eye(7))
    q, k, v = torch.randn(3, 7, 2, 4).unbind(0)
    shard = WholeSequence(Documents((0, 7)))
    assert_close(mixer.mix(q, k, v, shard), BidirectionalAttention(8, 2).mix(q, k, v, shard), "output")


@pytest.mark.parametrize("mixer", MIXERS)
def test_learns_to_fill_in_masked_tokens(mixer: str) -> None:
    encoder, shard = make_encoder(mixer, initializer_range=0.1), WholeSequence(Documents((0, 20, T)))
    batch = make_batch()
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        loss_sum, weight_sum = encoder.loss(batch, shard)
        assert weight_sum.item() == batch.weights.sum().item() > 5
        losses.append((loss_sum / weight_sum).item())
        optimizer.zero_grad()
        loss_sum.backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]


def test_masking_is_berts() -> None:
    tokens = torch.randint(0, 1000, (100_000,))
    batch = mask_tokens(tokens, 1000, 1000, 0.15)
    assert torch.equal(batch.labels, tokens)
    chosen = batch.weights > 0
    assert torch.equal(batch.tokens[~chosen], tokens[~chosen])
    assert 0.14 < chosen.double().mean() < 0.16
    masked, kept = batch.tokens[chosen] == 1000, batch.tokens[chosen] == tokens[chosen]
    assert 0.78 < masked.double().mean() < 0.82 and 0.09 < kept.double().mean() < 0.11


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EncoderConfig(mixer="mamba2"), "encoder.mixer 'mamba2' is none of attention, linear, linformer"),
        (lambda: EncoderConfig(hidden_size=10, num_heads=3), "must be a multiple"),
        (lambda: mask_tokens(torch.zeros(3), 1, 1, 0.0), r"\(0, 1\], but is 0.0"),
        (
            lambda: make_encoder("linformer", max_positions=5)(make_batch().tokens, WholeSequence(Documents((0, T)))),
            "document of 37 tokens is longer than max_positions 5",
        ),
        (
            lambda: make_encoder("linear")(make_batch().tokens, WholeSequence(Documents((0, T), 3))),
            "cannot go on or continue one at position 3",
        ),
    ],
)
def test_refusals(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


def learned(encoder: Encoder, batch: MaskedTokens, shard: SequenceShard) -> dict[str, Tensor]:
    encoder.zero_grad()
    loss = encoder.loss(batch, shard)[0]
    loss.backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in encoder.named_parameters()}
    return {"loss": loss.detach().double()[None], **grads}


def on_ranks(rank: int, world_size: int, mixer: str, engine: str) -> dict[str, tuple[float, str]]:
    """Errors of the loss and of every gradient, over layouts, document tables and recomputation, and their cells."""
    torch.set_default_dtype(torch.float64)
    comm, encoder, batch = Comm(dist.group.WORLD), make_encoder(mixer), make_batch()
    attention, worst = make_attention(engine, comm), {}
    for index, ((table, bounds), name) in enumerate(itertools.product(document_tables(T).items(), LAYOUTS)):
        documents = Documents(bounds)
        encoder.activation_checkpointing = "none"
        reference = learned(encoder, batch, WholeSequence(documents))
        layout = SequenceLayout.make(name, documents, world_size)
        if index % 3 == 2 and name == "contiguous":
            layout = SequenceLayout.contiguous(T, world_size, [T - 5, 5, *[0] * (world_size - 2)])
        encoder.activation_checkpointing = ("none", "full")[index % 2]
        shard = RankShard(layout, documents, comm, AllGather(comm), attention)
        found = learned(encoder, batch.rows(layout.parts[rank]), shard)
        for tensor, value in found.items():
            difference = error(comm.all_reduce(value, "verify").wait(), reference[tensor])
            if not difference <= worst.get(tensor, (-1.0, ""))[0]:
                worst[tensor] = (difference, f"{table}, {name}, {encoder.activation_checkpointing}")
    return worst


@pytest.mark.parametrize("mixer, engine", [("attention", "rsa"), ("linear", "all_gather"), ("linformer", "all_gather")])
def test_ranks_equal_one_process(mixer: str, engine: str) -> None:
    for rank, worst in enumerate(run_ranks(on_ranks, 3, mixer=mixer, engine=engine)):
        for tensor, (value, where) in worst.items():
            assert value <= TOLERANCE[torch.float64], f"rank {rank}, {tensor}: error {value:.1e} at {where}"


def received(rank: int, world_size: int, mixer: str, bounds: tuple[int, ...], layout: str) -> dict[str, int]:
    comm, encoder = Comm(dist.group.WORLD), make_encoder(mixer, num_layers=1)
    documents = Documents(bounds)
    placed = SequenceLayout.make(layout, documents, world_size)
    shard = RankShard(placed, documents, comm, AllGather(comm), make_attention("rsa", comm))
    learned(encoder, make_batch(bounds[-1]).rows(placed.parts[rank]), shard)
    return {label: count.bytes for (label, _), count in comm.ledger.counts.items()}


@pytest.mark.parametrize("mixer", ("linear", "linformer"))
@pytest.mark.parametrize(
    "bounds, layout, crossing",
    [((0, 36), "contiguous", 1), ((0, 12, 36), "contiguous", 1), ((0, 12, 24, 36), "contiguous", 0), ((0, 9, 36), "zigzag", 2)],
)
def test_traffic_counts_crossing_documents_and_no_length(
    mixer: str, bounds: tuple[int, ...], layout: str, crossing: int
) -> None:
    """A state (H K V) or projected keys and values (R H 2 K) of each document that ranks share, in one all-reduce each way."""
    size = {"linear": 4 * 4 * 4, "linformer": 3 * 4 * 8}[mixer] * 8
    expected = {f"document sum {way}": 2 * 2 * crossing * size // 3 for way in ("forward", "backward") if crossing}
    for found in run_ranks(received, 3, mixer=mixer, bounds=bounds, layout=layout):
        assert found == expected
