"""ParaGRU and ParaLSTM: as the plain cell token by token, exact on ranks at equal iterations, causal, isolated."""

import dataclasses
import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn

from longhaul.launcher.verify.exactness import compare, make_problem
from longhaul.models.config import ModelConfig
from longhaul.models.errors import UserError
from longhaul.models.mixers.paragru import ParaGRUConfig, ParaRNN
from longhaul.models.mixers.paralstm import ParaLSTMConfig
from longhaul.models.mixers.registry import MIXERS as REGISTRY
from longhaul.models.ops import recompute
from longhaul.models.ops.newton.naive import recurrence
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import WholeSequence
from longhaul.parallel.attention.all_gather import AllGatherAttention
from longhaul.parallel.comm import Comm, Ledger
from longhaul.parallel.exchange.registry import make_exchange
from longhaul.parallel.layout import SequenceLayout
from longhaul.parallel.shard import RankShard
from tests.harness.cases import document_tables, rank_lengths
from tests.harness.numerics import TOLERANCE, assert_bitwise_equal, assert_close, assert_trees_close
from tests.harness.pool import run_ranks

WIDTH = 8
CONFIG = ModelConfig(hidden_size=WIDTH, paragru=ParaGRUConfig(chunk=4), paralstm=ParaLSTMConfig(chunk=4))
MIXERS = ("paragru", "paralstm")
BOUNDS = (0, 3, 5, 33, 34, 60)
CONVERGED = {"iterations": 30, "tolerance": 1e-12}


def make_module(mixer: str, dtype: torch.dtype = torch.float64, **options) -> ParaRNN:
    """Gates that keep 99 % of a state a token; recurrent weights near one, so that the cell is far from linear."""
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, **{mixer: dataclasses.replace(getattr(CONFIG, mixer), **options)})
    module = REGISTRY[mixer].build(config, layer=1)
    module.reset_parameters()
    module = module.to(dtype)
    with torch.no_grad():
        module.recurrent.uniform_(-1.2, 1.2)
        gate, sign = module.memory_gate
        module.input_bias[gate].uniform_(3, 6).mul_(sign)
    return module


def make_shard(comm: Comm, exchange: str, layout: SequenceLayout, documents: Documents, keep_state: bool) -> RankShard:
    return RankShard(
        layout, documents, comm, make_exchange(exchange, comm), AllGatherAttention(comm), keep_state=keep_state
    )


def exactness(
    rank: int,
    world_size: int,
    mixer: str,
    dtype: torch.dtype,
    exchange: str = "all_gather",
    tables: tuple[str, ...] = ("one", "many_short", "spanning", "mixed"),
    options: dict[str, float] | None = None,
    num_tokens: int = 37,
) -> dict[str, tuple[float, str]]:
    """The worst error of every tensor over tables and layouts, with where it was. Three steps: not converged."""
    comm, worst = Comm(dist.group.WORLD), {}
    module = make_module(mixer, dtype, **(options or {"iterations": 3}))
    for table in tables:
        for first_position, keep_state in ((0, False), (5, True)):
            documents = Documents(document_tables(num_tokens)[table], first_position)
            problem = make_problem(module, documents, WIDTH, 1, dtype, keep_state)
            layouts = {
                name: SequenceLayout.contiguous(num_tokens, world_size, lengths)
                for name, lengths in rank_lengths(num_tokens, world_size).items()
            }
            layouts["zigzag"] = SequenceLayout.make("zigzag", num_tokens, world_size)
            for name, layout in layouts.items():
                errors = compare(module, functools.partial(make_shard, comm, exchange), layout, problem, comm)
                for tensor, value in errors.items():
                    if not value <= worst.get(tensor, (-1.0,))[0]:
                        worst[tensor] = (value, f"documents {table} from {first_position}, {name}, state {keep_state}")
    return worst


def check(results: list[dict[str, tuple[float, str]]], dtype: torch.dtype) -> None:
    for rank, worst in enumerate(results):
        assert {"output", "input gradient", "final state 1", "state gradient 1", "gradient of recurrent"} <= set(worst)
        for tensor, (value, where) in worst.items():
            assert value <= TOLERANCE[dtype], f"rank {rank}, {tensor}: error {value:.1e} at {where}"


@pytest.mark.parametrize("world_size", (1, 2, 3, 4))
@pytest.mark.parametrize("mixer", MIXERS)
def test_ranks_equal_one_process_at_equal_iterations(mixer: str, world_size: int) -> None:
    check(run_ranks(exactness, world_size, mixer=mixer, dtype=torch.float64, timeout=120), torch.float64)


@pytest.mark.parametrize("exchange", ("ring", "all_scan", "log_scan"))
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_exchange(mixer: str, exchange: str) -> None:
    options = {"exchange": exchange, "tables": ("mixed",), "dtype": torch.float64}
    check(run_ranks(exactness, 3, mixer=mixer, timeout=120, **options), torch.float64)


@pytest.mark.parametrize("mixer", MIXERS)
def test_adaptive_iterations_end_together(mixer: str) -> None:
    options = {"options": {"iterations": 30, "tolerance": 1e-6}, "tables": ("mixed",), "dtype": torch.float64}
    check(run_ranks(exactness, 3, mixer=mixer, timeout=120, **options), torch.float64)


@pytest.mark.parametrize("mixer", MIXERS)
def test_single_precision(mixer: str) -> None:
    check(run_ranks(exactness, 3, mixer=mixer, dtype=torch.float32, tables=("one", "mixed"), timeout=120), torch.float32)


def traffic(rank: int, world_size: int, mixer: str, num_tokens: int) -> list[tuple[str, int, int]]:
    comm = Comm(dist.group.WORLD, Ledger())
    layout = SequenceLayout.contiguous(num_tokens, world_size)
    module, shard = make_module(mixer, iterations=3), make_shard(comm, "all_gather", layout, Documents((0, num_tokens)), False)
    inputs = torch.randn(3, shard.num_tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    comm.ledger.reset()
    h, _ = module.solve(inputs, shard, None)
    h.sum().backward()
    return sorted((label, count.calls, count.bytes) for (_, label), count in comm.ledger.counts.items())


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_step_is_one_exchange(mixer: str) -> None:
    """Three forward and one backward, of one map a rank, whatever the length."""
    short, long = (run_ranks(traffic, 2, mixer=mixer, num_tokens=n, timeout=60)[0] for n in (20, 80))
    entries = 2 * WIDTH if mixer == "paragru" else (4 + 2) * WIDTH
    assert short == long
    assert sum(calls for _, calls, _ in short) == 4
    assert sum(size for _, _, size in short) == 4 * entries * 8


def recomputed(rank: int, world_size: int, mixer: str, activation_checkpointing: str) -> tuple[int, torch.Tensor]:
    comm = Comm(dist.group.WORLD, Ledger())
    module = make_module(mixer, iterations=30, tolerance=1e-6)
    shard = make_shard(comm, "all_gather", SequenceLayout.contiguous(20, world_size), Documents((0, 20)), False)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(shard.num_tokens, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    y = recompute.checkpoint(module, x, shard, None)[0] if activation_checkpointing == "full" else module(x, shard)[0]
    y.square().sum().backward()
    assert x.grad is not None
    return comm.ledger.total().messages, x.grad


@pytest.mark.parametrize("mixer", MIXERS)
def test_recomputation_sends_nothing(mixer: str) -> None:
    """Not even to agree on the number of steps."""
    for (sent, dx), (again, expected) in zip(
        run_ranks(recomputed, 2, mixer=mixer, activation_checkpointing="full", timeout=60),
        run_ranks(recomputed, 2, mixer=mixer, activation_checkpointing="none", timeout=60),
    ):
        assert sent == again > 0
        assert_close(dx, expected, "input gradient")


class Sequential:
    """The plain cell, one token after the other, by autograd."""

    def __init__(self, module: ParaRNN, documents: Documents, inputs: torch.Tensor, state: torch.Tensor | None) -> None:
        bound = module.config.bound
        weights = (bound * (module.recurrent / bound).tanh()).unbind()
        k = module.state_width
        zero = inputs.new_zeros(WIDTH) if k == 1 else inputs.new_zeros(WIDTH, k, 1)

        def step(h: torch.Tensor, t: int) -> torch.Tensor:
            return module.cell(h[None], inputs[:, t : t + 1].unbind(), weights)[0][0]

        segments = WholeSequence(documents).segments
        found, self.final = recurrence(step, zero, segments, None if state is None else state[None])
        self.states = torch.stack([step(h, t) for t, h in enumerate(found)])


@pytest.mark.parametrize("mixer", MIXERS)
def test_newton_equals_the_plain_cell(mixer: str, generator: torch.Generator) -> None:
    """Once the steps stand still: states, and gradients of everything, are those of backpropagation through time."""
    module, documents = make_module(mixer, **CONVERGED), Documents(BOUNDS, first_position=4)
    inputs = torch.randn(3, 60, WIDTH, generator=generator, dtype=torch.float64) * 0.5 + module.input_bias.detach()[:, None]
    shape = (WIDTH,) if module.state_width == 1 else (WIDTH, 2, 1)
    state = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
    leaves = inputs.requires_grad_(), state.requires_grad_(), module.recurrent
    states, final = module.solve(inputs, WholeSequence(documents, keep_state=True), state)
    plain = Sequential(module, documents, inputs, state)
    assert_close(states, plain.states, "states")
    assert_close(final, plain.final[0], "final state")
    dh, dfinal = torch.randn_like(states), torch.randn_like(final)
    found = torch.autograd.grad((states, final), leaves, (dh, dfinal))
    expected = torch.autograd.grad((plain.states, plain.final[0]), leaves, (dh, dfinal))
    for name, a, b in zip(("inputs", "incoming state", "recurrent weights"), found, expected):
        assert_close(a, b, f"gradient of {name}")


@pytest.mark.parametrize("mixer", MIXERS)
def test_jacobian(mixer: str, generator: torch.Generator) -> None:
    module = make_module(mixer)
    shape = (1, WIDTH) if module.state_width == 1 else (1, WIDTH, 2, 1)
    p = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    inputs = torch.randn(3, 1, WIDTH, generator=generator, dtype=torch.float64).unbind()
    weights = module.recurrent.detach().unbind()
    _, J = module.cell(p, inputs, weights)
    whole = torch.autograd.functional.jacobian(lambda h: module.cell(h, inputs, weights)[0], p)
    entries = whole.reshape(WIDTH, module.state_width, WIDTH, module.state_width)
    assert_close(J.reshape(WIDTH, module.state_width, -1), torch.stack([entries[c, :, c] for c in range(WIDTH)]), "blocks")
    off = entries * (1 - torch.eye(WIDTH, dtype=torch.float64))[:, None, :, None]
    assert not off.any(), "channels do not mix"


@pytest.mark.parametrize("mixer", MIXERS)
def test_four_steps_suffice_at_first(mixer: str, generator: torch.Generator) -> None:
    """With published initial values; each step squares the error."""
    errors = []
    for iterations in (1, 2, 3, 4):
        module = make_module(mixer, iterations=iterations)
        module.reset_parameters()
        with torch.no_grad():
            module.recurrent.uniform_(-0.5, 0.5, generator=generator.manual_seed(0))
            inputs = torch.randn(3, 200, WIDTH, generator=generator, dtype=torch.float64) + module.input_bias[:, None]
            documents = Documents((0, 200))
            plain = Sequential(module, documents, inputs, None).states
            errors.append((module.solve(inputs, WholeSequence(documents), None)[0] - plain).abs().max().item())
    assert errors[3] < 1e-10 < errors[2] < 1e-4 < errors[1] < errors[0]


@pytest.mark.parametrize("mixer", MIXERS)
def test_weights_that_flip_the_state_still_converge(mixer: str, generator: torch.Generator) -> None:
    """At the bound the first steps overshoot; the guesses stay finite and reach the plain cell."""
    module, documents = make_module(mixer, **CONVERGED), Documents((0, 300))
    with torch.no_grad():
        module.recurrent.fill_(-20.0)
        module.input_bias[module.memory_gate[0]].zero_()
        inputs = torch.randn(3, 300, WIDTH, generator=generator, dtype=torch.float64)
        states, _ = module.solve(inputs, WholeSequence(documents), None)
        assert_close(states, Sequential(module, documents, inputs, None).states, "states")


@pytest.mark.parametrize("mixer", MIXERS)
def test_no_token_sees_a_later_one(mixer: str, generator: torch.Generator) -> None:
    module, shard = make_module(mixer), WholeSequence(Documents((0, 60)))
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
    module: nn.Module = make_module(mixer, **CONVERGED)
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


@pytest.mark.parametrize("bad", ({"iterations": 0}, {"tolerance": -1.0}, {"bound": 0.0}))
def test_impossible_options_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        ParaGRUConfig(**bad)
