"""The delta rule against its token-by-token oracle, and the phases a base class derives."""

import pytest
import torch

from longhaul.models.ops.affine import Dense
from longhaul.models.ops.delta_rule.chunk import DeltaRule, delta_inputs
from longhaul.models.ops.delta_rule.naive import delta_rule
from longhaul.models.ops.recurrence import EachPart, Recurrence, scan
from longhaul.models.ops.segments import Documents, Segments
from tests.harness.cases import slow_log_decay
from tests.harness.numerics import assert_bitwise_equal, assert_close

HEADS, WIDTH_K, WIDTH_V, CHUNK = 3, 4, 5, 16
NAMES = ("dq", "dk", "dv", "db", "de", "dlog_decay", "dS_in")
STREAMS = {
    "one": ((0, 70), 0, [(0, 70)]),
    "continued": ((0, 70), 5, [(0, 70)]),
    "whole chunks": ((0, 64), 0, [(0, 64)]),
    "documents": ((0, 3, 5, 40, 41, 70), 2, [(0, 70)]),
    "parts, one empty": ((0, 3, 5, 40, 41, 70), 2, [(0, 17), (17, 17), (41, 70)]),
    "two parts": ((0, 70), 3, [(10, 30), (40, 70)]),
    "nothing": ((0,), 0, [(0, 0)]),
}
RULES = ("delta", "gated", "channels", "two writes")
DECAYS = ("slow", "mixed")


class Case:
    """Inputs of one rule: `delta` no decay, `gated` a head's, `channels` a channel's, `two writes` RWKV-7's."""

    def __init__(self, stream: str, rule: str, generator: torch.Generator, decay: str = "slow") -> None:
        bounds, first, parts = STREAMS[stream]
        self.segments = Segments(Documents(bounds, first), parts)
        T, N = self.segments.num_tokens, self.segments.num_parts

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        q, v, k = normal(T, HEADS, WIDTH_K), normal(T, HEADS, WIDTH_V), normal(T, HEADS, WIDTH_K)
        k, beta = k / k.norm(dim=-1, keepdim=True), 2 * torch.rand(T, HEADS, 1, generator=generator, dtype=torch.float64)
        log_decay = None
        if rule != "delta":
            log_decay = slow_log_decay(T, HEADS, generator, None if rule == "gated" else WIDTH_K)
            if decay == "mixed":  # some tokens forget all: exp(-c) of what came before would overflow
                log_decay = log_decay - 900.0 * (torch.rand(log_decay.shape, generator=generator) < 0.05)
        if rule == "two writes":
            e = normal(T, HEADS, WIDTH_K)
            x = (q, e / e.norm(dim=-1, keepdim=True), v, -k, beta * k, log_decay)
        else:
            x = (q, k, v, -beta * k, None, log_decay)
        self.x = tuple(None if tensor is None else tensor.requires_grad_() for tensor in x)
        self.S_in = normal(N, HEADS, WIDTH_K, WIDTH_V).requires_grad_()
        self.dout, self.dS_out = normal(T, HEADS, WIDTH_V), normal(N, HEADS, WIDTH_K, WIDTH_V)
        self.leaves = {name: x for name, x in zip(NAMES, (*self.x, self.S_in)) if x is not None}

    def gradients(self, out: torch.Tensor, S_out: torch.Tensor) -> dict[str, torch.Tensor]:
        found = torch.autograd.grad(
            (out, S_out), list(self.leaves.values()), (self.dout, self.dS_out), allow_unused=True, materialize_grads=True
        )
        return dict(zip(self.leaves, found))


class ByAutograd(Recurrence):
    """The oracle as an op that writes `run` and nothing else."""

    def state_shape(self, x):
        return HEADS, WIDTH_K, WIDTH_V

    def run(self, x, segments, S_in=None):
        return delta_rule(*x, segments, S_in)

    def linear_from_vjp(self, vjp, offset):
        return Dense.from_vjp(vjp, offset)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stream", STREAMS)
def test_chunks_equal_tokens(stream: str, rule: str, decay: str, generator: torch.Generator) -> None:
    case = Case(stream, rule, generator, decay)
    oracle = delta_rule(*case.x, case.segments, case.S_in)
    found = DeltaRule(CHUNK).run(case.x, case.segments, case.S_in)
    for name, a, b in zip(("out", "S_out"), found, oracle):
        assert_close(a, b, name)
    expected = case.gradients(*oracle)
    for name, gradient in case.gradients(*found).items():
        assert_close(gradient, expected[name], name)


@pytest.mark.parametrize("chunk", (1, 2, 64, 128))
@pytest.mark.parametrize("rule", RULES)
def test_any_chunk_gives_the_same(rule: str, chunk: int, generator: torch.Generator) -> None:
    case = Case("documents", rule, generator)
    a, b = (op.run(case.x, case.segments, case.S_in) for op in (DeltaRule(chunk), DeltaRule(CHUNK)))
    assert_close(a[0], b[0], "out")
    expected = case.gradients(*b)
    for name, gradient in case.gradients(*a).items():
        assert_close(gradient, expected[name], name)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stream", ["continued", "documents", "parts, one empty", "two parts"])
def test_derived_phases_equal_written_ones(stream: str, rule: str, generator: torch.Generator) -> None:
    case = Case(stream, rule, generator)
    x = case.x
    derived, written = ByAutograd(), DeltaRule(CHUNK)
    a, b = derived.summarize(x, case.segments).maps, written.summarize(x, case.segments).maps
    assert_close(a.offset, b.offset, "U")
    whole = [part for part, cut in enumerate(case.segments.cuts) if not cut]
    entered = [part for part in whole if case.segments.enters[part]]
    assert_close(b.linear.matrix[entered].detach(), a.linear.matrix[entered], "M")
    assert_close(a.apply(case.S_in).detach()[whole], b.apply(case.S_in).detach()[whole], "M S + U")
    C = [op.reverse(x, case.segments, (), case.dout).C for op in (derived, written)]
    enters = [part for part, enters in enumerate(case.segments.enters) if enters]
    assert_close(C[1][enters].detach(), C[0][enters], "C")
    each = EachPart(case.segments)
    results = [scan(op, x, case.segments, each, case.S_in, want_end=True) for op in (derived, written)]
    left, right = (case.gradients(*result) for result in results)
    for name in case.leaves:
        assert_close(right[name], left[name], name)


@pytest.mark.parametrize("rule", RULES)
def test_one_token_steps_equal_the_run(rule: str, generator: torch.Generator) -> None:
    case = Case("one", rule, generator)
    op = DeltaRule(CHUNK)
    out, S_out = op.run(case.x, case.segments)
    S, steps = torch.zeros_like(S_out[0]), []
    for t in range(case.segments.num_tokens):
        o, S = op.step(tuple(None if tensor is None else tensor[t : t + 1] for tensor in case.x), S)
        steps.append(o)
    assert_close(torch.cat(steps), out, "out")
    assert_close(S, S_out[0], "S_out")


@pytest.mark.parametrize("rule", RULES)
def test_no_bit_of_another_document_arrives(rule: str, generator: torch.Generator) -> None:
    case = Case("documents", rule, generator)
    op, changed = DeltaRule(CHUNK), slice(5, 40)
    x = [None if tensor is None else tensor.detach().clone() for tensor in case.x]
    edited = [None if tensor is None else tensor.clone() for tensor in x]
    for tensor in edited:
        if tensor is not None:
            tensor[changed] *= 1.7

    def results(inputs: list[torch.Tensor | None]) -> list[torch.Tensor]:
        leaves = [None if tensor is None else tensor.clone().requires_grad_() for tensor in inputs]
        wanted = [leaf for leaf in leaves if leaf is not None]
        out, S_out = op.run(tuple(leaves), case.segments, case.S_in.detach())
        return [out, *torch.autograd.grad((out, S_out), wanted, (case.dout, case.dS_out))]

    for name, a, b in zip(("out", *case.leaves), results(x), results(edited)):
        assert_bitwise_equal(a[:5], b[:5], name)
        assert_bitwise_equal(a[40:], b[40:], name)


@pytest.mark.parametrize("rule", RULES)
def test_float32_with_gates_that_remember(rule: str, generator: torch.Generator) -> None:
    case = Case("documents", rule, generator)
    exact = case.gradients(*DeltaRule(CHUNK).run(case.x, case.segments, case.S_in))
    x = tuple(None if tensor is None else tensor.detach().float().requires_grad_() for tensor in case.x)
    S_in = case.S_in.detach().float().requires_grad_()
    out, S_out = DeltaRule(CHUNK).run(x, case.segments, S_in)
    leaves = [leaf for leaf in (*x, S_in) if leaf is not None]
    gradients = torch.autograd.grad((out, S_out), leaves, (case.dout.float(), case.dS_out.float()))
    for name, gradient in zip(case.leaves, gradients):
        assert_close(gradient, exact[name], name, dtype=torch.float32)


def test_delta_inputs_write_what_the_prediction_lacks(generator: torch.Generator) -> None:
    """With beta 1 and unit keys that do not decay, reading a key gives back the value written last."""
    k = torch.randn(7, 1, WIDTH_K, generator=generator, dtype=torch.float64)
    k = k / k.norm(dim=-1, keepdim=True)
    v, beta = torch.randn(7, 1, WIDTH_V, generator=generator, dtype=torch.float64), torch.ones(7, 1, dtype=torch.float64)
    out, _ = DeltaRule(4).run(delta_inputs(k, k, v, beta), Segments(Documents((0, 7)), [(0, 7)]))
    assert_close(out, v, "out")


def test_a_chunk_is_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="24"):
        DeltaRule(24)
