"""Delta rules at the door: on N ranks equal to one process, causal, and one token at a time."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from longhaul.launcher.verify.exactness import compare, make_problem
from longhaul.models.config import ModelConfig
from longhaul.models.mixers.deltanet import DeltaNetConfig
from longhaul.models.mixers.gated_deltanet import GatedDeltaNetConfig
from longhaul.models.mixers.kimi_delta import KimiDeltaConfig
from longhaul.models.mixers.registry import MIXERS
from longhaul.models.mixers.rwkv7 import RWKV7Config
from longhaul.models.sequence import Documents, WholeSequence
from longhaul.parallel.comm import Comm
from longhaul.parallel.layout import SequenceLayout
from tests.harness.cases import document_tables, rank_lengths
from tests.harness.numerics import TOLERANCE, assert_close
from tests.harness.pool import run_ranks

from .ranks import every_third, make_shard

WIDTH = 12
CONFIG = ModelConfig(
    hidden_size=WIDTH,
    num_layers=4,
    num_heads=2,
    deltanet=DeltaNetConfig(negative_eigenvalues=True, output_gate=True, chunk=8),
    gated_deltanet=GatedDeltaNetConfig(head_dim=5, expand_v=2, num_value_heads=4, chunk=8),
    kimi_delta=KimiDeltaConfig(chunk=8),
    rwkv7=RWKV7Config(decay_rank=3, rate_rank=4, gate_rank=5, chunk=8),
)
FAMILY = ("deltanet", "gated_deltanet", "kimi_delta", "rwkv7")


def make_module(mixer: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """As initialised, but with gates that remember, and with noise where a parameter starts at a constant."""
    torch.manual_seed(0)
    module = MIXERS[mixer].build(CONFIG, layer=1)
    module.reset_parameters()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name == "A_log":
                parameter.uniform_(-6, -4)
            elif parameter.std() == 0:
                parameter.add_(0.3 * torch.randn_like(parameter))
            if name == "decay_up.bias":
                parameter.sub_(6)
    return module.to(dtype)


def exactness(rank: int, world_size: int, mixer: str, num_tokens: int, dtype: torch.dtype) -> dict[str, float]:
    """The worst error of every tensor over all tables and layouts, with where it was."""
    comm, worst = Comm(dist.group.WORLD), {}
    module = make_module(mixer, dtype)
    takes = every_third(world_size)
    for table, bounds in document_tables(num_tokens).items():
        for first_position, keep_state in ((0, False), (5, True)):
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


def check(results: list[dict[str, tuple[float, str]]], dtype: torch.dtype) -> None:
    for rank, worst in enumerate(results):
        assert {"output", "input gradient", "final state 1", "state gradient 1"} <= set(worst)
        for tensor, (value, where) in worst.items():
            assert value <= TOLERANCE[dtype], f"rank {rank}, {tensor}: error {value:.1e} at {where}"


@pytest.mark.parametrize("world_size", (1, 2, 3, 4))
@pytest.mark.parametrize("mixer", FAMILY)
def test_ranks_equal_one_process(mixer: str, world_size: int) -> None:
    dtype = torch.float64
    check(run_ranks(exactness, world_size, mixer=mixer, num_tokens=37, dtype=dtype, timeout=240), dtype)


@pytest.mark.parametrize("mixer", FAMILY)
def test_single_precision(mixer: str) -> None:
    dtype = torch.float32
    check(run_ranks(exactness, 3, mixer=mixer, num_tokens=37, dtype=dtype, timeout=240), dtype)


@pytest.mark.parametrize("mixer", FAMILY)
def test_one_token_at_a_time(mixer: str, generator: torch.Generator) -> None:
    module, length = make_module(mixer), 19
    x = torch.randn(length, WIDTH, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        expected, final = module(x, WholeSequence(Documents((0, length)), keep_state=True))
        state, rows = None, []
        for t in range(length):
            y, state = module(x[t : t + 1], WholeSequence(Documents((0, 1), t), keep_state=True), state)
            rows.append(y)
    assert_close(torch.cat(rows), expected, "output")
    for name, a, b in zip(final._fields, state, final):
        assert_close(a, b, name)


@pytest.mark.parametrize("mixer", FAMILY)
def test_documents_are_isolated_and_causal(mixer: str, generator: torch.Generator) -> None:
    module, bounds = make_module(mixer), (0, 2, 9, 30)
    x = torch.randn(30, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    y, _ = module(x, WholeSequence(Documents(bounds)))
    for start, stop in zip(bounds, bounds[1:]):
        alone, _ = module(x[start:stop], WholeSequence(Documents((0, stop - start))))
        assert_close(y[start:stop], alone, "a document alone")
    (dx,) = torch.autograd.grad(y[12].sum(), x)
    assert dx[:9].eq(0).all() and dx[13:].eq(0).all() and dx[9].abs().max() > 0


@pytest.mark.parametrize("mixer", FAMILY)
def test_every_parameter_learns(mixer: str, generator: torch.Generator) -> None:
    module = make_module(mixer)
    x = torch.randn(20, WIDTH, generator=generator, dtype=torch.float64)
    y, _ = module(x, WholeSequence(Documents((0, 20))))
    y.square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_rwkv7_follows_the_paper(generator: torch.Generator) -> None:
    """The layer written token by token with the paper's transposed state and the released decay."""
    module, length = make_module("rwkv7"), 17
    x = torch.randn(length, WIDTH, generator=generator, dtype=torch.float64)
    heads, eps = module.num_heads, module.norm_eps
    state = torch.zeros(heads, WIDTH // heads, WIDTH // heads, dtype=torch.float64)  # [H, V, K]
    rows, before = [], torch.zeros(WIDTH, dtype=torch.float64)
    for t in range(length):
        r, w, k, v, a, g = (x[t] * (1 - mix) + before * mix for mix in module.mix)
        before = x[t]
        d = module.decay_up(torch.tanh(module.decay_down(w)))
        w = torch.exp(-torch.exp(-F.softplus(-d) - 0.5))
        a = torch.sigmoid(module.rate_up(module.rate_down(a)))
        g = module.gate_up(torch.sigmoid(module.gate_down(g)))
        r, k, v = module.r(r), module.k(k), module.v(v)
        kappa = (k * module.k_k).view(heads, -1)
        kappa = kappa / kappa.norm(dim=-1, keepdim=True)
        k = k * (1 - module.k_a + a * module.k_a)
        r, w, k, v, a = (tensor.view(heads, -1) for tensor in (r, w, k, v, a))
        transition = torch.diag_embed(w) - kappa[:, :, None] * (a * kappa)[:, None, :]
        state = state @ transition + v[:, :, None] * k[:, None, :]
        o = torch.einsum("hvk,hk->hv", state, r)
        o = F.group_norm(o.reshape(1, WIDTH), heads, module.norm_weight, module.norm_bias, eps).view(heads, -1)
        o = o + (r * module.r_k * k).sum(-1, keepdim=True) * v
        rows.append(module.out(o.flatten() * g))
    found, _ = module(x, WholeSequence(Documents((0, length))))
    assert_close(found, torch.stack(rows), "output")
