"""Mitigations of state collapse: a sliding-window state is what its definition says, and exact on ranks, in chunks, by token."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longhaul.launcher.verify.exactness import compare, make_problem
from longhaul.models.config import ModelConfig
from longhaul.models.errors import UserError
from longhaul.models.lm import LanguageModel
from longhaul.models.mixers.forgetting import clipped, windowed_scan
from longhaul.models.mixers.mamba2 import Mamba2, Mamba2Config, Mamba2State
from longhaul.models.ops.scalar_decay import ScalarDecay
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import WholeSequence
from longhaul.models.streaming import LongStream, Streaming
from longhaul.parallel.comm import Comm
from longhaul.parallel.layout import SequenceLayout
from tests.harness.cases import document_tables, rank_lengths
from tests.harness.numerics import TOLERANCE, assert_close, assert_trees_close
from tests.harness.pool import run_ranks

from .ranks import WIDTH, every_third, make_shard, remembering

BOUNDS = (0, 2, 13, 14, 29)
OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"state_window": 4, "forget": 1.5, "insert": 0.7},
    "wider than documents": {"state_window": 12},
    "clip": {"state_norm_clip": 0.05},
}


def make(options: dict[str, Any]) -> Mamba2:
    torch.manual_seed(0)
    config = Mamba2Config(state_size=6, head_dim=8, num_groups=2, chunk=8, **options)
    module = Mamba2(WIDTH, config)
    module.reset_parameters()
    remembering(module.double())
    return module


def naive(q: Any, k: Any, v: Any, log_decay: Any, window: int, bounds: tuple[int, ...]) -> torch.Tensor:
    """`o_t = sum_j (a_{j+1} .. a_t) (q_t . k_j) v_j` over the window's tokens of the same document."""
    out, per_group = torch.zeros_like(v), v.shape[1] // k.shape[1]
    for start, stop in zip(bounds, bounds[1:]):
        for t in range(start, stop):
            for j in range(max(start, t - window + 1), t + 1):
                fade = log_decay[j + 1 : t + 1].sum(0).exp()  # [H]
                score = (q[t] * k[j]).sum(-1).repeat_interleave(per_group)
                out[t] = out[t] + (fade * score)[:, None] * v[j]
    return out


@pytest.mark.parametrize("window", (1, 3, 11, 40))
def test_a_window_is_the_sum_over_its_tokens(window: int) -> None:
    torch.manual_seed(1)
    length = BOUNDS[-1]
    q, k = torch.randn(2, length, 2, 3, dtype=torch.float64)
    v, log_decay = torch.randn(length, 4, 5, dtype=torch.float64), -0.1 * torch.rand(length, 4, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v, log_decay)]
    out, _, _ = windowed_scan(WholeSequence(Documents(BOUNDS)), ScalarDecay(chunk=8), tuple(leaves), window, None, None)
    expected = naive(*leaves, window, BOUNDS)
    assert_close(out, expected, "output")
    cotangent = torch.randn_like(out)
    found, wanted = (torch.autograd.grad(y, leaves, cotangent) for y in (out, expected))
    for name, one, other in zip(("q", "k", "v", "log decay"), found, wanted):
        assert_close(one, other, f"gradient of {name}")


def exactness(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, float]:
    comm, worst, module = Comm(dist.group.WORLD), dict[str, float](), make(options)
    takes = every_third(world_size)
    for bounds in document_tables(23).values():
        for first_position in (0, 5):
            documents = Documents(bounds, first_position)
            problem = make_problem(module, documents, WIDTH, 1, torch.float64, True)
            layouts = [SequenceLayout.contiguous(23, world_size, own) for own in rank_lengths(23, world_size).values()]
            for layout in (*layouts, SequenceLayout.make("zigzag", documents, world_size)):
                if takes():
                    errors = compare(module, functools.partial(make_shard, comm), layout, problem, comm)
                    worst = {name: max(value, worst.get(name, 0.0)) for name, value in errors.items()}
    return worst


@pytest.mark.parametrize("world_size", (2, 3))
@pytest.mark.parametrize("name", OPTIONS)
def test_ranks(name: str, world_size: int) -> None:
    for found in run_ranks(exactness, world_size, options=OPTIONS[name]):
        for tensor, error in found.items():
            assert error <= TOLERANCE[torch.float64], f"{tensor}: {error}"


@torch.no_grad()
def test_one_token_at_a_time() -> None:
    module = make(OPTIONS["window"])
    x = torch.randn(11, WIDTH, dtype=torch.float64)
    expected, last = module(x, WholeSequence(Documents((0, 11)), keep_state=True))
    state = None
    for t in range(11):
        y, state = module(x[t : t + 1], WholeSequence(Documents((0, 1), first_position=t), keep_state=True), state)
        assert_close(y[0], expected[t], f"token {t}")
    assert_trees_close(state, last, "state")


def test_chunks_of_a_stream() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        options = Mamba2Config(state_size=6, head_dim=8, chunk=8, **OPTIONS["window"])
        model = LanguageModel(ModelConfig(vocab_size=20, hidden_size=16, num_layers=2, num_heads=2, pattern="M-", mamba2=options))
        tokens, labels = torch.randint(20, (2, 29))
        documents, weights = Documents(BOUNDS), torch.rand(29)
        out = model(tokens, WholeSequence(documents), labels=labels, weights=weights)
        out.loss_sum.backward()
        expected = {name: parameter.grad for name, parameter in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        make_chunk = lambda part, goes_on: WholeSequence(part, keep_state=goes_on)  # noqa: E731
        streamed = Streaming(model, 5, make_chunk).backward(LongStream(tokens, labels, weights, documents))
        assert_close(streamed.loss_sum, out.loss_sum, "loss")
        assert_trees_close({name: parameter.grad for name, parameter in model.named_parameters()}, expected, "gradients")
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_state_is_clipped_where_it_enters_and_says_so() -> None:
    S = torch.stack([torch.full((2, 2), 3.0), torch.full((2, 2), 0.01)])
    found = clipped(S, 2.0)
    assert found is not None
    assert_close(found[0], torch.full((2, 2), 1.0), "a head above")
    assert torch.equal(found[1], S[1])
    module = make(OPTIONS["clip"])
    assert "state_norm_clip" in str(module.inexact)
    assert make(OPTIONS["window"]).inexact is None
    x, shard = torch.randn(5, WIDTH, dtype=torch.float64), WholeSequence(Documents((0, 5), first_position=3), keep_state=True)
    wide = {"dtype": torch.float64}
    large = Mamba2State(torch.zeros(3, 32 + 2 * 2 * 6, **wide), torch.ones(4, 6, 8, **wide))
    plain = make({})
    small = large._replace(S=clipped(large.S, 0.05))
    assert_close(module(x, shard, large)[0], plain(x, shard, small)[0], "clipped first")


@pytest.mark.parametrize("bad", ({"forget": 0.0}, {"insert": -1.0}, {"state_window": 0}, {"state_norm_clip": 0.0}))
def test_nonsense_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        dataclasses.replace(Mamba2Config(), **bad)
