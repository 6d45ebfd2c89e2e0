"""Mamba-1, S4D and S5 on ranks and in one process: exact, causal, isolated, the same by chunks and by single tokens."""

import dataclasses
import functools
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from longhaul.launcher.verify.exactness import compare, make_problem
from longhaul.models.config import ModelConfig
from longhaul.models.errors import UserError
from longhaul.models.mixers.mamba1 import Mamba1Config
from longhaul.models.mixers.registry import MIXERS as REGISTRY
from longhaul.models.mixers.s4d import S4D, S4DConfig, initial_frequencies
from longhaul.models.mixers.s5 import S5, S5Config
from longhaul.models.ops.diagonal_ssm.hippo import hippo_normal, zero_order_hold
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import WholeSequence
from longhaul.parallel.attention.all_gather import AllGatherAttention
from longhaul.parallel.comm import Comm
from longhaul.parallel.exchange.registry import make_exchange
from longhaul.parallel.layout import SequenceLayout
from longhaul.parallel.shard import RankShard
from tests.door.ranks import every_third
from tests.harness.cases import document_tables, rank_lengths
from tests.harness.numerics import TOLERANCE, assert_bitwise_equal, assert_close, assert_trees_close
from tests.harness.pool import run_ranks

WIDTH = 8
CONFIG = ModelConfig(
    hidden_size=WIDTH,
    num_heads=2,
    mamba1=Mamba1Config(state_size=3, chunk=8),
    s4d=S4DConfig(state_size=6, chunk=8),
    s5=S5Config(state_size=12, blocks=2, chunk=8),
)
MIXERS = ("mamba1", "s4d", "s5")
BOUNDS = (0, 3, 5, 33, 34, 60)


def make_module(mixer: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Decays of a few thousandths a token and less, so that what a rank hands over matters."""
    torch.manual_seed(0)
    module = REGISTRY[mixer].build(CONFIG, layer=1)
    module.reset_parameters()
    module = module.to(dtype)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name == "A_log":
                parameter.uniform_(-6, -2)
            if name == "log_A_real":
                parameter.uniform_(-4, -2)  # times a step of 0.001 to 0.1
    return module


def make_shard(comm: Comm, exchange: str, layout: SequenceLayout, documents: Documents, keep_state: bool) -> RankShard:
    return RankShard(
        layout, documents, comm, make_exchange(exchange, comm), AllGatherAttention(comm), keep_state=keep_state
    )


def exactness(
    rank: int,
    world_size: int,
    mixer: str,
    num_tokens: int,
    dtype: torch.dtype,
    exchange: str = "all_gather",
    tables: tuple[str, ...] = ("one", "many_short", "edge", "spanning", "mixed"),
) -> dict[str, tuple[float, str]]:
    """The worst error of every tensor over all tables and layouts, with where it was."""
    comm, worst = Comm(dist.group.WORLD), {}
    module = make_module(mixer, dtype)
    takes = every_third(world_size)
    for table in tables:
        bounds = document_tables(num_tokens)[table]
        for first_position, keep_state in ((0, False), (5, True)):
            documents = Documents(bounds, first_position)
            problem = make_problem(module, documents, WIDTH, 1, dtype, keep_state)
            for name, lengths in rank_lengths(num_tokens, world_size).items():
                if not takes():
                    continue
                layout = SequenceLayout.contiguous(num_tokens, world_size, lengths)
                errors = compare(module, functools.partial(make_shard, comm, exchange), layout, problem, comm)
                for tensor, value in errors.items():
                    if not value <= worst.get(tensor, (-1.0,))[0]:
                        worst[tensor] = (value, f"documents {table} from {first_position}, {name}, state {keep_state}")
    return worst


@pytest.mark.parametrize("world_size", (1, 2, 3, 4))
@pytest.mark.parametrize("mixer", MIXERS)
def test_ranks_equal_one_process(mixer: str, world_size: int) -> None:
    dtype = torch.float64
    for rank, worst in enumerate(run_ranks(exactness, world_size, mixer=mixer, num_tokens=37, dtype=dtype, timeout=120)):
        assert {"output", "input gradient", "final state 0", "state gradient 0"} <= set(worst)
        for tensor, (value, where) in worst.items():
            assert value <= TOLERANCE[dtype], f"rank {rank}, {tensor}: error {value:.1e} at {where}"


@pytest.mark.parametrize("exchange", ("ring", "ring_blocking", "all_scan", "log_scan"))
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_exchange(mixer: str, exchange: str) -> None:
    options = {"exchange": exchange, "tables": ("one", "mixed"), "num_tokens": 37, "dtype": torch.float64}
    for rank, worst in enumerate(run_ranks(exactness, 3, mixer=mixer, timeout=120, **options)):
        for tensor, (value, where) in worst.items():
            assert value <= TOLERANCE[torch.float64], f"rank {rank}, {tensor}: error {value:.1e} at {where}"


@pytest.mark.parametrize("mixer", MIXERS)
def test_single_precision(mixer: str) -> None:
    for rank, worst in enumerate(run_ranks(exactness, 3, mixer=mixer, num_tokens=63, dtype=torch.float32, timeout=120)):
        for tensor, (value, where) in worst.items():
            assert value <= TOLERANCE[torch.float32], f"rank {rank}, {tensor}: error {value:.1e} at {where}"


@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("mixer", MIXERS)
def test_no_token_sees_a_later_one(mixer: str, training: bool, generator: torch.Generator) -> None:
    module, shard = make_module(mixer).train(training), WholeSequence(Documents((0, 60)))
    x = torch.randn(60, WIDTH, generator=generator, dtype=torch.float64)
    before, _ = module(x, shard)
    for edited in (1, 31, 59):
        changed = x.clone()
        changed[edited] += 1
        after, _ = module(changed, shard)
        assert_bitwise_equal(after[:edited], before[:edited], f"outputs before token {edited}")
        assert (after[edited:] != before[edited:]).any(1).all(), "a later token forgot at once"


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_packed_document_equals_itself_alone(mixer: str, generator: torch.Generator) -> None:
    module = make_module(mixer)
    x = torch.randn(60, WIDTH, generator=generator, dtype=torch.float64)
    packed, _ = module(x, WholeSequence(Documents(BOUNDS)))
    for start, stop in zip(BOUNDS, BOUNDS[1:]):
        alone, _ = module(x[start:stop], WholeSequence(Documents((0, stop - start))))
        assert_close(packed[start:stop], alone, f"document {start}..{stop}")


@pytest.mark.parametrize("mixer", MIXERS)
def test_one_token_steps_equal_the_whole(mixer: str, generator: torch.Generator) -> None:
    module = make_module(mixer)
    x = torch.randn(30, WIDTH, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        whole, final = module(x, WholeSequence(Documents((0, 30)), keep_state=True))
        state, outputs = None, []
        for t in range(30):
            shard = WholeSequence(Documents((0, 1), first_position=t), keep_state=True)
            y, state = module(x[t : t + 1], shard, state)
            outputs.append(y)
    assert_close(torch.cat(outputs), whole, "outputs")
    assert_trees_close(state, final, "state")


def test_hippo_normal_is_the_normal_part_of_legs() -> None:
    size = 8
    n = torch.arange(size, dtype=torch.float64)
    legs = -((2 * n + 1).sqrt()[:, None] * (2 * n + 1).sqrt()).tril(-1) - torch.diag(n + 1)
    P = (n + 0.5).sqrt()
    normal = legs + P[:, None] * P
    frequencies, V = hippo_normal(size)
    values = torch.complex(torch.full_like(frequencies, -0.5), frequencies)
    assert_close(2 * (V * values @ V.mH).real, normal, "V Lambda V^* and its conjugate")
    assert_close(V.mH @ V, torch.eye(size // 2, dtype=V.dtype), "orthonormal")


def test_initial_frequencies() -> None:
    assert_close(initial_frequencies("lin", 6), torch.tensor([0, math.pi, 2 * math.pi], dtype=torch.float64), "lin")
    inverse = torch.tensor([5.0, 1.0, 0.2], dtype=torch.float64) * 6 / math.pi
    assert_close(initial_frequencies("inv", 6), inverse, "inv")
    assert_close(initial_frequencies("legs", 6), hippo_normal(6)[0], "legs")


def test_zero_order_hold_of_a_slow_state_keeps_its_digits() -> None:
    """Its gradient with respect to A too, which is dt^2 / 2 where dt A is small."""
    dt = 1e-3
    A = torch.tensor([-0.5 + 0.3j, -0.5 + 40j, -1e-9 + 1e-9j, -0.5 + 4000j], dtype=torch.complex128)
    wide, slope = ((A * dt).exp() - 1) / A, (dt * A * (A * dt).exp() - (A * dt).exp() + 1) / A.square()
    wide[2], slope[2] = dt, dt**2 / 2
    for dtype, tolerance in ((torch.complex64, 1e-6), (torch.complex128, 1e-9)):
        given = A.to(dtype).requires_grad_()
        found = zero_order_hold(given * dt, torch.tensor(dt, dtype=dtype.to_real()))
        found.backward(torch.ones_like(found))
        assert given.grad is not None
        for each in range(len(A)):  # one by one: the slopes differ by orders of magnitude
            assert_close(found[each] / dt, wide[each] / dt, f"B-bar {each}", tolerance=tolerance)
            assert_close(given.grad[each].conj() / dt**2, slope[each] / dt**2, f"slope {each}", tolerance=tolerance)


@pytest.mark.parametrize("bad", (lambda: S4DConfig(state_size=5), lambda: S4DConfig(init="fout"), lambda: S5Config(blocks=3)))
def test_impossible_sizes_are_refused(bad) -> None:
    with pytest.raises(UserError, match=r"s4d|s5"):
        bad()


@pytest.mark.parametrize("mixer", MIXERS)
def test_published_initial_values(mixer: str) -> None:
    module = REGISTRY[mixer].build(dataclasses.replace(CONFIG, hidden_size=64), layer=0)
    module.reset_parameters()
    if mixer == "mamba1":
        assert_close(module.A_log.exp(), torch.tensor([1.0, 2, 3]).expand(128, 3), "-A")
        dt = torch.nn.functional.softplus(module.dt_bias)
    else:
        dt = module.log_dt.exp()
    assert 0.9e-3 < dt.min() < 0.03 and 0.01 < dt.max() < 0.11
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("init", ("legs", "inv", "lin"))
def test_s4d_is_a_convolution(init: str, generator: torch.Generator) -> None:
    """The layer as published: its kernel `2 Re(C (exp(dt A) - 1) / A exp(dt A l))`, convolved by FFT."""
    module = S4D(WIDTH, S4DConfig(state_size=6, init=init, chunk=8)).double()
    module.reset_parameters()
    x = torch.randn(50, WIDTH, generator=generator, dtype=torch.float64)
    A = torch.complex(-module.log_A_real.exp(), module.A_imag)
    dtA = A * module.log_dt.exp()[:, None]
    C = torch.view_as_complex(module.C) * (dtA.exp() - 1) / A
    kernel = 2 * torch.einsum("dk,dkl->dl", C, (dtA[..., None] * torch.arange(50)).exp()).real
    y = torch.fft.irfft(torch.fft.rfft(kernel, 100) * torch.fft.rfft(x.T, 100), 100)[:, :50].T
    y = torch.nn.functional.gelu(y + module.D * x)
    a, b = module.out(y).chunk(2, dim=-1)
    assert_close(module(x, WholeSequence(Documents((0, 50))))[0], a * b.sigmoid(), "y")


def test_s5_starts_as_hippo_held_for_a_step(generator: torch.Generator) -> None:
    """With one step size, the diagonal layer is the dense real system `A = HiPPO-N, B, C` under a zero-order hold."""
    size, step = 8, 0.05
    module = S5(WIDTH, S5Config(state_size=size, chunk=8)).double()
    module.reset_parameters()
    frequencies, V = hippo_normal(size)
    B, C = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((size, WIDTH), (WIDTH, size)))
    with torch.no_grad():
        module.log_dt.fill_(math.log(step))
        module.log_A_real.fill_(math.log(0.5))
        module.A_imag.copy_(frequencies)  # float32 draws went through reset_parameters
        module.B.copy_(torch.view_as_real(V.mH @ B.to(V.dtype)))
        module.C.copy_(torch.view_as_real(C.to(V.dtype) @ V))
    A = 2 * (V * torch.complex(torch.full_like(frequencies, -0.5), frequencies) @ V.mH).real
    held = torch.linalg.matrix_exp(step * A)
    entered = torch.linalg.solve(A, (held - torch.eye(size, dtype=A.dtype)) @ B)
    x = torch.randn(30, WIDTH, generator=generator, dtype=torch.float64)
    state, outputs = torch.zeros(size, dtype=torch.float64), []
    for u in x:
        state = held @ state + entered @ u
        outputs.append(C @ state + module.D * u)
    y = torch.nn.functional.gelu(torch.stack(outputs))
    expected = y * module.gate(y).sigmoid()
    assert_close(module(x, WholeSequence(Documents((0, 30))))[0], expected, "y")
