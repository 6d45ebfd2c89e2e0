"""The diagonal-decay recurrence against its token-by-token oracle, with gates that remember and gates that forget."""

import pytest
import torch

from longhaul.models.ops.affine import LogScale
from longhaul.models.ops.diagonal_decay.chunk import DiagonalDecay
from longhaul.models.ops.diagonal_decay.naive import diagonal_decay
from longhaul.models.ops.recurrence import EachPart, Recurrence, scan
from longhaul.models.ops.segments import Documents, Segments
from tests.harness.cases import slow_log_decay
from tests.harness.numerics import assert_bitwise_equal, assert_close

HEADS, WIDTH_K, WIDTH_V, CHUNK = 2, 3, 5, 16
STREAMS = {
    "one": ((0, 70), 0, [(0, 70)]),
    "continued": ((0, 70), 5, [(0, 70)]),
    "whole chunks": ((0, 64), 0, [(0, 64)]),
    "documents": ((0, 3, 5, 40, 41, 70), 2, [(0, 70)]),
    "parts, one empty": ((0, 3, 5, 40, 41, 70), 2, [(0, 17), (17, 17), (41, 70)]),
    "two parts": ((0, 70), 3, [(10, 30), (40, 70)]),
    "nothing": ((0,), 0, [(0, 0)]),
}
DECAYS = ("slow", "strong", "mixed", "none")
NAMES = ("dq", "dk", "dv", "dlog_decay", "dS_in")


def make_log_decay(kind: str, num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    """[T, H, K]; mixed: every channel forgets within a token at some tokens and remembers at the others."""
    slow = slow_log_decay(num_tokens, HEADS, generator, WIDTH_K)
    if kind == "slow":
        return slow
    if kind == "none":
        return torch.zeros_like(slow)
    strong = -20 - torch.rand(slow.shape, generator=generator, dtype=slow.dtype)
    if kind == "strong":
        return strong
    return torch.where(torch.rand(slow.shape, generator=generator) < 0.2, strong, slow)


class Case:
    def __init__(self, stream: str, decay: str, generator: torch.Generator) -> None:
        bounds, first, parts = STREAMS[stream]
        self.segments = Segments(Documents(bounds, first), parts)
        T, N = self.segments.num_tokens, self.segments.num_parts

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        q, k, v = normal(T, HEADS, WIDTH_K), normal(T, HEADS, WIDTH_K), normal(T, HEADS, WIDTH_V)
        self.x = q, k, v, make_log_decay(decay, T, generator)
        self.S_in = normal(N, HEADS, WIDTH_K, WIDTH_V)
        self.dout, self.dS_out = normal(T, HEADS, WIDTH_V), normal(N, HEADS, WIDTH_K, WIDTH_V)
        self.leaves = [*self.x, self.S_in]
        for leaf in self.leaves:
            leaf.requires_grad_()

    def gradients(self, out: torch.Tensor, S_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((out, S_out), self.leaves, (self.dout, self.dS_out), allow_unused=True, materialize_grads=True)


class ByAutograd(Recurrence):
    """The oracle as an op that writes `run` and nothing else."""

    def __init__(self, read_before: bool) -> None:
        self.read_before = read_before

    def state_shape(self, x):
        return HEADS, WIDTH_K, WIDTH_V

    def run(self, x, segments, S_in=None):
        return diagonal_decay(*x, segments, S_in, self.read_before)

    def linear_from_vjp(self, vjp, offset):
        return LogScale.from_vjp(vjp, offset, axes=2)


@pytest.mark.parametrize("read_before", (False, True))
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("stream", STREAMS)
def test_chunks_equal_tokens(stream: str, decay: str, read_before: bool, generator: torch.Generator) -> None:
    case = Case(stream, decay, generator)
    oracle = diagonal_decay(*case.x, case.segments, case.S_in, read_before)
    found = DiagonalDecay(read_before, CHUNK).run(case.x, case.segments, case.S_in)
    for name, a, b in zip(("out", "S_out"), found, oracle):
        assert_close(a, b, name)
    for name, a, b in zip(NAMES, case.gradients(*found), case.gradients(*oracle)):
        assert_close(a, b, name)


@pytest.mark.parametrize("chunk", (1, 2, 128))
def test_any_power_of_two_is_a_chunk(chunk: int, generator: torch.Generator) -> None:
    case = Case("documents", "mixed", generator)
    results = [DiagonalDecay(False, size).run(case.x, case.segments, case.S_in) for size in (CHUNK, chunk)]
    for name, a, b in zip(NAMES, *(case.gradients(*result) for result in results)):
        assert_close(a, b, name)
    with pytest.raises(ValueError, match="power of two, but is 48"):
        DiagonalDecay(chunk=48)


@pytest.mark.parametrize("read_before", (False, True))
@pytest.mark.parametrize("stream", ["continued", "documents", "parts, one empty", "nothing"])
def test_derived_phases_equal_written_ones(stream: str, read_before: bool, generator: torch.Generator) -> None:
    case = Case(stream, "slow", generator)
    derived, written = ByAutograd(read_before), DiagonalDecay(read_before, CHUNK)
    with torch.no_grad():
        a, b = (op.summarize(case.x, case.segments).maps for op in (derived, written))
        C = [op.reverse(case.x, case.segments, (), case.dout).C for op in (derived, written)]
    assert isinstance(b.linear, LogScale) and b.linear.value.shape == (case.segments.num_parts, HEADS, WIDTH_K)
    assert_close(a.offset, b.offset, "U")
    whole = [part for part, cut in enumerate(case.segments.cuts) if not cut]
    assert_close(a.apply(case.S_in).detach()[whole], b.apply(case.S_in).detach()[whole], "M S + U")
    assert_close(*C, "C")
    results = [scan(op, case.x, case.segments, EachPart(case.segments), case.S_in, want_end=True) for op in (derived, written)]
    for name, left, right in zip(NAMES, *(case.gradients(*result) for result in results)):
        assert_close(left, right, name)


@pytest.mark.parametrize("read_before", (False, True))
def test_one_token_steps_equal_the_run(read_before: bool, generator: torch.Generator) -> None:
    case = Case("one", "mixed", generator)
    op = DiagonalDecay(read_before, CHUNK)
    out, S_out = op.run(case.x, case.segments)
    S, steps = torch.zeros_like(S_out[0]), []
    for t in range(case.segments.num_tokens):
        o, S = op.step(tuple(tensor[t : t + 1] for tensor in case.x), S)
        steps.append(o)
    assert_close(torch.cat(steps), out, "out")
    assert_close(S, S_out[0], "S_out")


@pytest.mark.parametrize("read_before", (False, True))
def test_no_bit_of_another_document_arrives(read_before: bool, generator: torch.Generator) -> None:
    case = Case("documents", "slow", generator)
    op, changed = DiagonalDecay(read_before, CHUNK), slice(5, 40)
    x = [tensor.detach().clone() for tensor in case.x]
    edited = [tensor.clone() for tensor in x]
    for tensor in edited:
        tensor[changed] *= 1.7

    def results(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        out, S_out = op.run(tuple(leaves), case.segments, case.S_in.detach())
        return [out, *torch.autograd.grad((out, S_out), leaves, (case.dout, case.dS_out))]

    for name, a, b in zip(("out", *NAMES), results(x), results(edited)):
        assert_bitwise_equal(a[:5], b[:5], name)
        assert_bitwise_equal(a[40:], b[40:], name)
        assert not torch.equal(a[changed], b[changed]), name


@pytest.mark.parametrize("read_before", (False, True))
@pytest.mark.parametrize("decay", DECAYS)
def test_float32_whatever_the_decays(decay: str, read_before: bool, generator: torch.Generator) -> None:
    # No floor: the gradient of a strong decay is itself small, and must still be right.
    case = Case("continued", decay, generator)
    single = [leaf.detach().float().requires_grad_() for leaf in case.leaves]
    double = [leaf.detach().double().requires_grad_() for leaf in single]
    cotangents = case.dout.float(), case.dS_out.float()
    op = DiagonalDecay(read_before, 64)
    found = op.run(tuple(single[:4]), case.segments, single[4])
    exact = diagonal_decay(*double[:4], case.segments, double[4], read_before)
    for name, a, b in zip(("out", "S_out"), found, exact):
        assert_close(a, b, name, torch.float32, floor=0)
    gradients = torch.autograd.grad(found, single, cotangents)
    expected = torch.autograd.grad(exact, double, tuple(cotangent.double() for cotangent in cotangents))
    for name, a, b in zip(NAMES, gradients, expected):
        assert_close(a, b, name, torch.float32, floor=1e-30)


def test_half_precision_inputs_keep_a_wide_state(generator: torch.Generator) -> None:
    case = Case("documents", "slow", generator)
    x = tuple(tensor.detach().bfloat16() for tensor in case.x)
    out, S_out = DiagonalDecay(False, CHUNK).run(x, case.segments)
    exact, _ = diagonal_decay(*(tensor.double() for tensor in x), case.segments)
    assert out.dtype == torch.bfloat16 and S_out.dtype == torch.float32
    assert_close(out, exact.bfloat16(), "out")
