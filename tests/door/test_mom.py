"""Mixture of memories: against a token-by-token oracle, on ranks, causal, and its balance loss in any packing."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from longhaul.launcher.verify.exactness import compare, make_problem
from longhaul.models.config import ModelConfig
from longhaul.models.errors import UserError
from longhaul.models.mixers import mom
from longhaul.models.mixers.mom import MoM, MoMConfig
from longhaul.models.ops import recompute
from longhaul.models.ops.routing import buckets as buckets_file
from longhaul.models.ops.segments import Segments
from longhaul.models.sequence import Documents, WholeSequence
from longhaul.parallel.attention.all_gather import AllGatherAttention
from longhaul.parallel.comm import Comm
from longhaul.parallel.exchange.all_gather import AllGather
from longhaul.parallel.exchange.ring import Ring
from longhaul.parallel.layout import SequenceLayout
from longhaul.parallel.shard import RankShard
from tests.door.ranks import every_third
from tests.harness.cases import document_tables, rank_lengths
from tests.harness.numerics import TOLERANCE, assert_bitwise_equal, assert_close
from tests.harness.pool import run_ranks

WIDTH, BOUNDS = 8, (0, 2, 9, 10, 40)
VARIANTS = {
    "published": MoMConfig(chunk=8),
    "scalar decay, convolved before": MoMConfig(rule="scalar_decay", convolution="sequence", expand_v=2, chunk=8),
    "delta, one projection": MoMConfig(rule="delta", single_kv_proj=True, num_memories=3, top_k=1, chunk=8),
    "linear, nothing shared": MoMConfig(rule="linear", shared_memory=False, chunk=8),
}


def make_module(variant: str, dtype: torch.dtype = torch.float64) -> MoM:
    """Gates that remember, weights of order one, and a router that is not in two minds."""
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=WIDTH, num_heads=2, initializer_range=0.4, mom=VARIANTS[variant])
    module = MoM.build(config, layer=1)
    module.reset_parameters()
    with torch.no_grad():
        module.router.mul_(2)
        if module.A_log is not None:
            module.A_log.uniform_(-6, -4)
    return module.to(dtype)


def tokens(length: int, generator: torch.Generator) -> Tensor:
    return torch.randn(length, WIDTH, generator=generator, dtype=torch.float64)


def margin(module: MoM, x: Tensor) -> float:
    """The least by which a chosen memory was better than one not chosen."""
    best = module.probabilities(x).sort(dim=1, descending=True).values
    k = module.config.top_k
    return (best[:, k - 1] - best[:, k]).min().item()


class Oracle:
    """The layer token by token: a list of rows and a matrix a head for each memory, touched when it is chosen."""

    def __init__(self, module: MoM) -> None:
        self.module = module

    def __call__(self, x: Tensor, bounds: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        outputs, S = [], torch.zeros(0)
        for start, stop in zip(bounds, bounds[1:]):
            y, S = self.document(x[start:stop])
            outputs.append(y)
        return torch.cat(outputs), S

    def document(self, x: Tensor) -> tuple[Tensor, Tensor]:
        module, config, heads = self.module, self.module.config, self.module.num_heads
        streams: list[list[Tensor]] = [[] for _ in range(module.num_memories)]
        S = [x.new_zeros(heads, module.width_k, module.width_v) for _ in streams]
        before, outputs = x.new_zeros(config.conv_width - 1, WIDTH), []
        for token in x:
            p = (module.router @ token).softmax(0)
            weights = {m: p[m] for m in p.argsort(descending=True)[: config.top_k].tolist()}
            total = sum(weights.values())
            weights = {m: weight / total for m, weight in weights.items()}
            if config.shared_memory:
                weights[config.num_memories] = torch.ones_like(p[0])
            source = token
            if config.convolution == "sequence":
                before = torch.cat([before, token[None]])
                source = F.silu((before.T * module.conv_weight).sum(1))
                before = before[1:]
            o = x.new_zeros(heads, module.width_v)
            for m, weight in weights.items():
                n = 0 if config.single_kv_proj else m
                row = torch.cat([module.q.weight @ source, module.k[n] @ source, module.v[n] @ source])
                if config.convolution == "memory":
                    streams[m].append(row)
                    rows = torch.stack(streams[m][-config.conv_width :])
                    row = F.silu((rows.T * module.conv_weight[:, -len(rows) :]).sum(1))
                q, k, v = (part.unflatten(0, (heads, -1)) for part in row.split(module.widths))
                q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
                state = S[m]
                if module.decay is not None:
                    a = torch.exp(-module.A_log.exp() * F.softplus(module.decay[n] @ token + module.dt_bias))
                    state = a[:, None, None] * state
                if module.beta is not None:
                    beta = (module.beta[n] @ token).sigmoid()[:, None]
                    v = beta * (v - torch.einsum("hk,hkv->hv", k, state))
                S[m] = state + k[:, :, None] * v[:, None, :]
                o = o + weight * torch.einsum("hk,hkv->hv", q, S[m]) * module.width_k**-0.5
            o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + module.norm.eps) * module.norm.weight
            o = o.flatten() * F.silu(module.gate.weight @ token)
            outputs.append(module.out.weight @ o)
        return torch.stack(outputs), torch.cat(S)


@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_equals_tokens(variant: str, generator: torch.Generator) -> None:
    module = make_module(variant)
    x = tokens(BOUNDS[-1], generator).requires_grad_()
    assert margin(module, x) > 1e-6, "a tie would make the comparison void"
    found, state = module(x, WholeSequence(Documents(BOUNDS), keep_state=True))
    expected, S = Oracle(module)(x, BOUNDS)
    assert_close(found, expected, "output")
    assert_close(state.S, S, "state")
    leaves = {"x": x, **dict(module.named_parameters())}
    cotangents = tokens(BOUNDS[-1], generator), torch.randn(S.shape, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad(pair, leaves.values(), cotangents) for pair in ((found, state.S), (expected, S))]
    for name, a, b in zip(leaves, *gradients):
        assert b.abs().max() > 0, name
        assert_close(a, b, f"gradient of {name}")


EXCHANGES: dict[str, Callable[[Comm], Any]] = {"all_gather": AllGather, "ring": Ring}


def exactness(rank: int, world_size: int, variant: str, exchange: str, dtype: torch.dtype) -> dict[str, Any]:
    """The worst error of every tensor over all tables and layouts, with where it was.

    The layouts hold ranks of no token, and of one, which touches k memories and must be the identity for the others.
    """
    comm, worst, num_tokens = Comm(dist.group.WORLD), {}, 33
    module = make_module(variant, dtype)

    def make_shard(layout: SequenceLayout, documents: Documents, keep_state: bool) -> RankShard:
        carry = EXCHANGES[exchange](comm)
        return RankShard(layout, documents, comm, carry, AllGatherAttention(comm), keep_state=keep_state)

    takes = every_third(world_size)
    for table, bounds in document_tables(num_tokens).items():
        for first_position, keep_state in ((0, False), (5, True)):
            documents = Documents(bounds, first_position)
            problem = make_problem(module, documents, WIDTH, 1, dtype, keep_state)
            assert margin(module, problem.x) > 1e-6
            for name, lengths in rank_lengths(num_tokens, world_size).items():
                if not takes():
                    continue
                layout = SequenceLayout.contiguous(num_tokens, world_size, lengths)
                for tensor, value in compare(module, make_shard, layout, problem, comm).items():
                    if not value <= worst.get(tensor, (-1.0,))[0]:
                        worst[tensor] = (value, f"documents {table} from {first_position}, {name}, state {keep_state}")
    return worst


def check(results: list[dict[str, tuple[float, str]]], dtype: torch.dtype) -> None:
    for rank, worst in enumerate(results):
        assert {"output", "input gradient", "final state 1", "state gradient 1", "gradient of router"} <= set(worst)
        for tensor, (value, where) in worst.items():
            assert value <= TOLERANCE[dtype], f"rank {rank}, {tensor}: error {value:.1e} at {where}"


@pytest.mark.parametrize("world_size", (1, 2, 3, 4))
def test_ranks_equal_one_process(world_size: int) -> None:
    dtype = torch.float64
    check(run_ranks(exactness, world_size, variant="published", exchange="all_gather", dtype=dtype, timeout=240), dtype)


@pytest.mark.parametrize("variant", list(VARIANTS)[1:])
def test_every_variant_on_ranks(variant: str) -> None:
    dtype = torch.float64
    check(run_ranks(exactness, 3, variant=variant, exchange="ring", dtype=dtype, timeout=240), dtype)


def test_published_layer_on_a_ring_in_single_precision() -> None:
    dtype = torch.float32
    check(run_ranks(exactness, 3, variant="published", exchange="ring", dtype=dtype, timeout=240), dtype)


@pytest.mark.parametrize("layout", ["zigzag", "striped"])
def test_layouts_of_several_parts(layout: str) -> None:
    for errors in run_ranks(several_parts, 2, layout=layout):
        assert max(errors.values()) <= TOLERANCE[torch.float64], errors


def several_parts(rank: int, world_size: int, layout: str) -> dict[str, float]:
    comm, documents = Comm(dist.group.WORLD), Documents((0, 7, 9, 45), 3)
    module = make_module("published")
    problem = make_problem(module, documents, WIDTH, 1, torch.float64, True)
    cut = SequenceLayout.make(layout, documents, world_size)

    def make_shard(layout: SequenceLayout, documents: Documents, keep_state: bool) -> RankShard:
        return RankShard(layout, documents, comm, AllGather(comm), AllGatherAttention(comm), keep_state=keep_state)

    return compare(module, make_shard, cut, problem, comm)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_token_at_a_time(variant: str, generator: torch.Generator) -> None:
    module, length = make_module(variant), 19
    x = tokens(length, generator)
    with torch.no_grad():
        expected, final = module(x, WholeSequence(Documents((0, length)), keep_state=True))
        state, rows = None, []
        for t in range(length):
            y, state = module(x[t : t + 1], WholeSequence(Documents((0, 1), t), keep_state=True), state)
            rows.append(y)
    assert_close(torch.cat(rows), expected, "output")
    for name, a, b in zip(final._fields, state, final):
        assert_close(a, b, name)


def test_a_stream_in_two_runs(generator: torch.Generator) -> None:
    module = make_module("published")
    x = tokens(30, generator)
    expected, final = module(x, WholeSequence(Documents((0, 4, 30)), keep_state=True))
    first, state = module(x[:6], WholeSequence(Documents((0, 4, 6)), keep_state=True))
    second, state = module(x[6:], WholeSequence(Documents((0, 24), 2), keep_state=True), state)
    assert_close(torch.cat([first, second]), expected, "output")
    for name, a, b in zip(final._fields, state, final):
        assert_close(a, b, name)


def check_causal(module: MoM) -> None:
    """Editing a token, in the middle or at the end, changes no output before it, nor of a later document."""
    x = tokens(120, torch.Generator().manual_seed(0))
    shard = WholeSequence(Documents((0, 30, 110, 120)))
    for token, end in ((100, 110), (119, 120)):
        edited = x.clone()
        edited[token] += 1
        with torch.no_grad():
            before, after = (module(version, shard)[0] for version in (x, edited))
        assert_close(after[:token], before[:token], "outputs before the edit")
        assert_close(after[end:], before[end:], "a later document")
        assert (after[token] - before[token]).abs().max() > 0


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("variant", VARIANTS)
def test_causal_in_training_and_evaluation(variant: str, training: bool) -> None:
    check_causal(make_module(variant).train(training))


def test_an_unstable_sort_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The released layer's first fault: rows of one memory in another order than that of time."""

    def unstable(keys: Tensor) -> Tensor:
        shuffled = torch.randperm(len(keys), generator=torch.Generator().manual_seed(1))
        return shuffled[keys[shuffled].argsort(stable=True)]

    module = make_module("published")
    monkeypatch.setattr(buckets_file, "stable_order", unstable)
    with pytest.raises(AssertionError, match="outputs before the edit"):
        check_causal(module)


def test_a_convolution_across_memories_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The released layer's second fault, in training: one memory's last tokens lead to the next one's first."""

    def across(rows: Tensor, context: Tensor, weight: Tensor, bias: None, segments: Segments, activation: str) -> Tensor:
        whole = WholeSequence(Documents((0, len(rows)))).segments
        return causal_conv(rows, context[:1], weight, bias, whole, activation)

    module, causal_conv = make_module("published"), mom.causal_conv
    monkeypatch.setattr(mom, "causal_conv", across)
    with pytest.raises(AssertionError, match="outputs before the edit"):
        check_causal(module)


@pytest.mark.parametrize("variant", VARIANTS)
def test_documents_are_isolated(variant: str, generator: torch.Generator) -> None:
    module = make_module(variant)
    x = tokens(BOUNDS[-1], generator).requires_grad_()
    y, _ = module(x, WholeSequence(Documents(BOUNDS)))
    for start, stop in zip(BOUNDS, BOUNDS[1:]):
        alone, _ = module(x[start:stop], WholeSequence(Documents((0, stop - start))))
        assert_close(y[start:stop], alone, "a document alone")
    (dx,) = torch.autograd.grad(y[12].sum(), x)
    assert dx[:10].eq(0).all() and dx[13:].eq(0).all() and dx[10].abs().max() > 0


def test_a_memory_that_is_not_chosen_does_not_decay(generator: torch.Generator) -> None:
    module = make_module("published")
    with torch.no_grad():
        module.A_log.fill_(2)  # decays that would show
        x = tokens(30, generator)
        _, before = module(x[:29], WholeSequence(Documents((0, 29)), keep_state=True))
        _, after = module(x[29:], WholeSequence(Documents((0, 1), 29), keep_state=True), before)
        _, chosen = module.route(x[29:])
    for memory, (old, new) in enumerate(zip(before.S.unflatten(0, (5, 2)), after.S.unflatten(0, (5, 2)))):
        if memory in chosen[0].tolist():
            assert (old - new).abs().max() > 1e-3
        else:
            assert_bitwise_equal(new, old, f"memory {memory}")


# The balance loss.
def balance_by_document(module: MoM, x: Tensor) -> Tensor:
    """The loss of one document, token by token."""
    config, p = module.config, module.probabilities(x)
    f = torch.zeros(config.num_memories, dtype=x.dtype)
    for token in p:
        f[token.argsort(descending=True)[: config.top_k]] += 1 / (config.top_k * len(x))
    return config.balance_weight * config.num_memories * (f * p.mean(0)).sum()


@pytest.mark.parametrize("variant", ["published", "delta, one projection"])
def test_balance_loss_knows_documents_not_packing(variant: str, generator: torch.Generator) -> None:
    module, x = make_module(variant), tokens(BOUNDS[-1], generator)
    aux = module.auxiliary(x, WholeSequence(Documents(BOUNDS)))
    pieces = [x[start:stop] for start, stop in zip(BOUNDS, BOUNDS[1:])]
    alone = torch.cat([module.auxiliary(piece, WholeSequence(Documents((0, len(piece))))) for piece in pieces])
    assert_close(aux, alone, "packed")
    assert_close(aux, torch.stack([balance_by_document(module, piece) for piece in pieces]), "by definition")
    (gradient,) = torch.autograd.grad(aux.sum(), module.router)
    (expected,) = torch.autograd.grad(sum(balance_by_document(module, piece) for piece in pieces), module.router)
    assert gradient.abs().max() > 0
    assert_close(gradient, expected, "gradient of the router")


def balance_on_ranks(rank: int, world_size: int, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    comm, module = Comm(dist.group.WORLD), make_module("published")
    layout = SequenceLayout.contiguous(BOUNDS[-1], world_size, lengths)
    shard = RankShard(layout, Documents(BOUNDS), comm, AllGather(comm), AllGatherAttention(comm))
    x = tokens(BOUNDS[-1], torch.Generator().manual_seed(0))[slice(*layout.parts[rank][0])]
    aux = module.auxiliary(x, shard)
    (aux[shard.document_ids].sum() + 0 * aux.sum()).backward()  # each rank's own tokens, one of which may be none
    return aux.detach(), comm.all_reduce(module.router.grad, "test").wait()


def test_balance_loss_on_ranks(generator: torch.Generator) -> None:
    module, x = make_module("published"), tokens(BOUNDS[-1], generator)
    shard = WholeSequence(Documents(BOUNDS))
    expected = module.auxiliary(x, shard)
    expected[shard.document_ids].sum().backward()
    for lengths in ((15, 0, 25), (1, 20, 19)):
        for aux, gradient in run_ranks(balance_on_ranks, 3, lengths=lengths):
            assert_close(aux, expected.detach(), "loss")
            assert_close(gradient, module.router.grad, "gradient")


def test_no_weight_means_no_balance_loss(generator: torch.Generator) -> None:
    module = make_module("published")
    module.config = dataclasses.replace(module.config, balance_weight=0.0)
    assert module.auxiliary(tokens(5, generator), WholeSequence(Documents((0, 5)))) is None


def test_initialised_as_published() -> None:
    torch.manual_seed(0)
    module = MoM.build(ModelConfig(hidden_size=64, num_heads=4), layer=0)
    module.reset_parameters()
    for name in ("router", "q.weight", "k", "v", "beta", "decay", "conv_weight", "gate.weight", "out.weight"):
        weight = module.get_parameter(name)
        assert abs(weight.std().item() / 0.02 - 1) < 0.2 and abs(weight.mean().item()) < 4e-3, name
    assert module.k.shape == (5, 64, 64) and module.router.shape == (4, 64)
    step = F.softplus(module.dt_bias)
    assert step.min() >= 1e-3 * 0.999 and step.max() <= 0.1 * 1.001
    assert module.A_log.exp().max() <= 16
    exempt = {name for name, parameter in module.named_parameters() if getattr(parameter, "no_weight_decay", False)}
    assert exempt == {"A_log", "dt_bias", "norm.weight"}


@pytest.mark.parametrize(
    "options", [{"top_k": 5}, {"rule": "delat"}, {"convolution": "none"}, {"balance_weight": -1.0}, {"chunk": 48}]
)
def test_mistakes_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=str(next(iter(options.values())))):
        MoMConfig(**options)


def wire(rank: int, world_size: int, length: int) -> list[dict[str, int]]:
    """Bytes received by label: in the forward, and in a backward that recomputes the layer."""
    comm, module = Comm(dist.group.WORLD), make_module("published")
    layout = SequenceLayout.contiguous(length, world_size)
    shard = RankShard(layout, Documents((0, length)), comm, AllGather(comm), AllGatherAttention(comm))
    x = tokens(length, torch.Generator().manual_seed(0))[slice(*layout.parts[rank][0])].requires_grad_()
    received = []
    comm.ledger.reset()
    y, _ = recompute.checkpoint(module, x, shard)
    received.append({label: count.bytes for (label, _), count in comm.ledger.counts.items()})
    comm.ledger.reset()
    y.square().sum().backward()
    received.append({label: count.bytes for (label, _), count in comm.ledger.counts.items()})
    return received


@pytest.mark.parametrize("length", (20, 60))
def test_tails_and_states_travel_once_whatever_the_length(length: int) -> None:
    module = make_module("published")
    memories, heads, width = 5, 2, 4
    state = memories * heads * 2 * width * width  # U [K, V] and M [K, K] of each head of each memory
    tail = memories * 3 * sum(module.widths)
    for forward, backward in run_ranks(wire, 2, length=length):
        assert forward == {"prefix forward": 8 * (tail + memories), "state forward": 8 * state}
        assert backward == {"prefix backward": 8 * tail, "state backward": 8 * state}
