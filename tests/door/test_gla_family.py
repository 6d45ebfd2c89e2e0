"""GLA, HGRN2, RWKV-6, Based, ReBased: exact on ranks, equal to their papers' equations, generated one token at a time."""

import functools
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from longhaul.launcher.verify.exactness import compare, make_problem
from longhaul.models.config import ModelConfig
from longhaul.models.errors import UserError
from longhaul.models.mixers.based import BasedConfig, square_features, taylor_features
from longhaul.models.mixers.gla import GLAConfig
from longhaul.models.mixers.hgrn2 import HGRN2Config, forget_gate
from longhaul.models.mixers.rebased import ReBasedConfig
from longhaul.models.mixers.registry import MIXERS as REGISTRY
from longhaul.models.mixers.rwkv6 import RWKV6Config, token_shift
from longhaul.models.ops.diagonal_decay.naive import diagonal_decay
from longhaul.models.ops.segments import Documents, Segments
from longhaul.models.sequence import WholeSequence
from longhaul.parallel.comm import Comm
from longhaul.parallel.layout import SequenceLayout
from tests.harness.cases import document_tables, rank_lengths
from tests.harness.numerics import TOLERANCE, assert_close, assert_trees_close
from tests.harness.pool import run_ranks

from .ranks import every_third, make_shard

WIDTH, HEADS = 16, 2
CONFIG = ModelConfig(
    hidden_size=WIDTH,
    num_heads=HEADS,
    gla=GLAConfig(expand_k=0.5, feature_map="silu", gate_low_rank=3, chunk=8),
    hgrn2=HGRN2Config(expand_ratio=5, chunk=8),
    rwkv6=RWKV6Config(mix_low_rank=3, decay_low_rank=4, chunk=8),
    based=BasedConfig(feature_dim=3, chunk=8),
    rebased=ReBasedConfig(feature_dim=3, chunk=8),
)
FAMILY = ("gla", "hgrn2", "rwkv6", "based", "rebased")
SLOW = {"gla": ("decay_up.bias", 3, 6), "hgrn2": ("lower_bound", 4, 6), "rwkv6": ("decay_up.bias", -8, -5)}


def make_module(mixer: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """No parameter at a value that hides an error (zero, one), and gates that remember."""
    torch.manual_seed(0)
    module = REGISTRY[mixer].build(CONFIG, layer=1)
    module.reset_parameters()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
            slow, low, high = SLOW.get(mixer, ("", 0, 0))
            if name == slow:
                parameter.uniform_(low, high)
    return module.to(dtype)


def exactness(rank: int, world_size: int, mixer: str, num_tokens: int, dtype: torch.dtype) -> dict[str, float]:
    """The worst error of every tensor over all tables and layouts, with where it was."""
    comm, worst, module = Comm(dist.group.WORLD), {}, make_module(mixer, dtype)
    takes = every_third(world_size)
    for table, bounds in document_tables(num_tokens).items():
        for first_position, keep_state in ((0, True), (5, True), (5, False)):
            documents = Documents(bounds, first_position)
            problem = make_problem(module, documents, WIDTH, 1, dtype, keep_state)
            for name, lengths in rank_lengths(num_tokens, world_size).items():
                if not takes():
                    continue
                layout = SequenceLayout.contiguous(num_tokens, world_size, lengths)
                errors = compare(module, functools.partial(make_shard, comm), layout, problem, comm)
                for tensor, value in errors.items():
                    if not value <= worst.get(tensor, (-1.0,))[0]:
                        worst[tensor] = (value, f"documents {table} from {first_position}, {name}, state {keep_state}")
    return worst


@pytest.mark.parametrize("world_size", (1, 2, 3, 4))
@pytest.mark.parametrize("mixer", FAMILY)
def test_ranks_equal_one_process(mixer: str, world_size: int) -> None:
    for rank, worst in enumerate(run_ranks(exactness, world_size, mixer=mixer, num_tokens=37, dtype=torch.float64, timeout=120)):
        assert {"output", "input gradient", "final state 0", "state gradient 0"} <= set(worst)
        for tensor, (value, where) in worst.items():
            assert value <= TOLERANCE[torch.float64], f"rank {rank}, {tensor}: error {value:.1e} at {where}"


@pytest.mark.parametrize("mixer", FAMILY)
def test_single_precision(mixer: str) -> None:
    for rank, worst in enumerate(run_ranks(exactness, 3, mixer=mixer, num_tokens=63, dtype=torch.float32, timeout=120)):
        for tensor, (value, where) in worst.items():
            assert value <= TOLERANCE[torch.float32], f"rank {rank}, {tensor}: error {value:.1e} at {where}"


@pytest.mark.parametrize("mixer", FAMILY)
def test_one_token_steps_equal_the_full_run(mixer: str) -> None:
    module, length = make_module(mixer), 21
    x = torch.randn(length, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        y, final = module(x, WholeSequence(Documents((0, length)), keep_state=True))
        state, outputs = None, []
        for t in range(length):
            one = WholeSequence(Documents((0, 1), first_position=t), keep_state=True)
            out, state = module(x[t : t + 1], one, state)
            outputs.append(out)
    assert_close(torch.cat(outputs), y, "outputs")
    assert_trees_close(state, final, "state")


def test_gla_equals_its_equations() -> None:
    module = make_module("gla")
    x, documents = torch.randn(19, WIDTH, dtype=torch.float64), Documents((0, 6, 19))
    q, k, v = module.qkv(x).split([8, 8, 16], dim=-1)
    alpha = torch.sigmoid(module.decay_up(module.decay_down(x))) ** (1 / 16)
    S, rows = torch.zeros(HEADS, 4, 8, dtype=torch.float64), []
    for t in range(19):
        S = torch.zeros_like(S) if t in documents.bounds else S
        key, value = F.silu(k[t]).view(HEADS, 4), v[t].view(HEADS, 8)
        S = alpha[t].view(HEADS, 4, 1) * S + key[:, :, None] * value[:, None]
        rows.append(torch.einsum("hk,hkv->hv", F.silu(q[t]).view(HEADS, 4) / 2, S))
    o = F.rms_norm(torch.stack(rows), (8,), module.norm.weight, 1e-5).flatten(1)
    assert_close(module(x, WholeSequence(documents))[0], module.out(o * F.silu(module.gate(x))), "output")


def test_hgrn2_equals_its_equations() -> None:
    module = make_module("hgrn2")
    x, documents = torch.randn(19, WIDTH, dtype=torch.float64), Documents((0, 6, 19))
    q, f, i = (tensor.unflatten(-1, (HEADS, -1)) for tensor in module.qfi(x).split([10, 10, 16], dim=-1))
    bound = module.lower_bound.sigmoid()
    forget = bound + (1 - bound) * f.sigmoid()
    segments = WholeSequence(documents).segments
    o, _ = diagonal_decay(F.silu(q), 1 - forget, i, forget.log(), segments)
    o = F.rms_norm(o, (8,), module.norm.weight, 1e-5).flatten(1)
    assert_close(module(x, WholeSequence(documents))[0], module.out(o), "output")


def test_lower_bounds_start_as_a_fresh_shared_table_gives() -> None:
    table = torch.zeros(CONFIG.num_layers).softmax(0)
    expected = table.cumsum(0) - table[0]
    for layer in range(CONFIG.num_layers):
        module = REGISTRY["hgrn2"].build(CONFIG, layer)
        module.reset_parameters()
        if layer:
            assert_close(module.lower_bound.sigmoid(), expected[layer].expand(HEADS, 5), f"layer {layer}")
        else:
            assert module.lower_bound is None and expected[0] == 0


@pytest.mark.parametrize("bound", (None, -90.0, -1.0, 30.0))
def test_forget_gates_keep_their_digits(bound: float | None) -> None:
    logits = torch.tensor([-80.0, -20.0, -1.0, 0.0, 3.0, 8.0, 14.0, 30.0], requires_grad=True)
    lower = None if bound is None else torch.tensor(bound)
    log_forget, forgotten = forget_gate(logits, lower)
    kept = 0.0 if bound is None else 1 / (1 + math.exp(-bound))
    for index, logit in enumerate(logits.tolist()):
        lost = (1 - kept if bound is None or bound < 20 else math.exp(-bound)) / (1 + math.exp(logit))
        exact = math.log1p(-lost) if lost < 0.5 else math.log(kept + (1 - kept) / (1 + math.exp(-logit)))
        assert forgotten[index].item() == pytest.approx(lost, rel=1e-5)
        assert log_forget[index].item() == pytest.approx(exact, rel=1e-5)
    assert torch.autograd.grad(log_forget.sum(), logits)[0].isfinite().all()


def test_rwkv6_equals_its_equations() -> None:
    module, half = make_module("rwkv6"), WIDTH // HEADS
    x, documents = torch.randn(19, WIDTH, dtype=torch.float64), Documents((0, 6, 19))
    S, rows = torch.zeros(HEADS, half, half, dtype=torch.float64), []
    for t in range(19):
        start = t in documents.bounds
        S = torch.zeros_like(S) if start else S
        delta = (torch.zeros_like(x[t]) if start else x[t - 1]) - x[t]
        low = torch.tanh((x[t] + delta * module.mix_x) @ module.mix_down.weight.T).view(5, -1)
        mixed = [x[t] + delta * (module.mix[s] + low[s] @ module.mix_up[s]) for s in range(5)]
        d = module.decay_up.bias + module.decay_up.weight @ torch.tanh(module.decay_down.weight @ mixed[0])
        k, v, r = (
            linear(row).view(HEADS, half) for linear, row in zip((module.key, module.value, module.receptance), mixed[1:4])
        )
        outer = k[:, :, None] * v[:, None]
        o = torch.einsum("hk,hkv->hv", r, S + module.bonus[:, :, None] * outer)
        S = torch.exp(-torch.exp(d)).view(HEADS, half, 1) * S + outer
        normed = F.group_norm(o.flatten()[None], HEADS, module.norm_weight, module.norm_bias, 64e-5)[0]
        rows.append(module.out(normed * F.silu(module.gate(mixed[4]))))
    assert_close(module(x, WholeSequence(documents))[0], torch.stack(rows), "output")


def test_token_shift_stops_at_documents_and_reads_the_context() -> None:
    x, context = torch.arange(1.0, 8.0)[:, None], torch.tensor([[[-1.0]], [[-2.0]], [[-3.0]]])
    segments = Segments(Documents((0, 2, 9), first_position=4), [(0, 3), (3, 3), (5, 9)])
    assert token_shift(x, context, segments).flatten().tolist() == [-1, 1, 0, -3, 4, 5, 6]


@pytest.mark.parametrize("layer", (0, 3))
def test_rwkv6_starts_as_released(layer: int) -> None:
    module = REGISTRY["rwkv6"].build(CONFIG, layer)
    module.reset_parameters()
    decay = module.decay_up.bias
    assert decay[0] == -6 and decay[-1] == -1 and (decay.diff() > 0).all()
    assert module.mix_x[0] == 1 and not module.mix_down.weight.any()
    assert module.bonus.flatten()[0].item() == pytest.approx(layer / 3)
    assert module.mix[2, 1].item() == pytest.approx(1 - (1 / WIDTH) ** (1 - layer / 4) - 0.3 * layer / 3)


def test_features_are_their_kernels() -> None:
    x, y = torch.randn(2, 7, 16, dtype=torch.float64)
    product = (x * y).sum(-1)
    assert square_features(x).shape == (7, 136) and taylor_features(x).shape == (7, 153)
    assert_close((square_features(x) * square_features(y)).sum(-1), product**2, "square")
    s = product / 4
    assert_close((taylor_features(x) * taylor_features(y)).sum(-1), 1 + s + s**2 / 2, "taylor")


@pytest.mark.parametrize("mixer", ("based", "rebased"))
def test_kernel_attention_equals_its_equations(mixer: str) -> None:
    module = make_module(mixer)
    x = torch.randn(19, WIDTH, dtype=torch.float64)
    q, k, v = (tensor.unflatten(-1, (HEADS, -1)) for tensor in module.qkv(x).split([6, 6, 16], dim=-1))
    if mixer == "rebased":
        q, k = (F.layer_norm(tensor, (3,)) * module.weight[which] + module.bias[which] for which, tensor in enumerate((q, k)))
    s = torch.einsum("ihf,jhf->hij", q, k) / 3**0.5
    scores = (1 + s + s**2 / 2 if mixer == "based" else s**2).tril()
    total = scores.sum(-1, keepdim=True) + (0 if mixer == "based" else 1e-6)
    o = torch.einsum("hij,jhv->ihv", scores / total, v)
    assert_close(module(x, WholeSequence(Documents((0, 19))))[0], module.out(o.flatten(1)), "output")


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="power of two, but is 48"):
        RWKV6Config(chunk=48)
    with pytest.raises(UserError, match=r"gla\.expand_k 0\.1 makes a width of 1"):
        REGISTRY["gla"].build(ModelConfig(hidden_size=16, num_heads=2, gla=GLAConfig(expand_k=0.1)), 0)
    with pytest.raises(UserError, match="feature_map 'cube' is none of"):
        GLAConfig(feature_map="cube")
