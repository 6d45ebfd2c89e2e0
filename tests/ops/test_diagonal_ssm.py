"""The diagonal state-space recurrence against its token-by-token oracle, and the phases a base class derives."""

import math

import pytest
import torch

from longhaul.models.ops.affine import Constant, Scale
from longhaul.models.ops.diagonal_ssm import DiagonalSSM, products
from longhaul.models.ops.diagonal_ssm.naive import diagonal_ssm
from longhaul.models.ops.recurrence import EachPart, Recurrence, scan
from longhaul.models.ops.segments import Documents, Segments
from tests.harness.numerics import assert_bitwise_equal, assert_close

CHANNELS, WIDTH, CHUNK = 5, 3, 8
NAMES = ("dx", "dlog_decay", "dc", "dS_in")
STREAMS = {
    "one": ((0, 70), 0, [(0, 70)]),
    "continued": ((0, 70), 5, [(0, 70)]),
    "whole chunks": ((0, 64), 0, [(0, 64)]),
    "documents": ((0, 3, 5, 40, 41, 70), 2, [(0, 70)]),
    "parts, one empty": ((0, 3, 5, 40, 41, 70), 2, [(0, 17), (17, 17), (41, 70)]),
    "two parts": ((0, 70), 3, [(10, 30), (40, 70)]),
    "nothing": ((0,), 0, [(0, 0)]),
}


class Case:
    """Constants with time constants of 10 to 100 lengths, and rotations of up to half a turn a token."""

    def __init__(self, stream: str, is_complex: bool, generator: torch.Generator) -> None:
        bounds, first, parts = STREAMS[stream]
        self.segments = Segments(Documents(bounds, first), parts)
        T, N = self.segments.num_tokens, self.segments.num_parts

        def normal(*shape: int, is_complex: bool = True) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.complex128 if is_complex else torch.float64)

        def uniform() -> torch.Tensor:
            return torch.rand(CHANNELS, WIDTH, generator=generator, dtype=torch.float64)

        log_decay = torch.complex(-1 / (700 * 10 ** uniform()), math.pi * uniform())
        self.x = (normal(T, CHANNELS, is_complex=is_complex), log_decay, normal(CHANNELS, WIDTH))
        self.S_in = normal(N, CHANNELS, WIDTH)
        self.dout, self.dS_out = normal(T, CHANNELS, is_complex=is_complex), normal(N, CHANNELS, WIDTH)
        self.leaves = [*self.x, self.S_in]
        for leaf in self.leaves:
            leaf.requires_grad_()

    def gradients(self, out: torch.Tensor, S_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(
            (out, S_out), self.leaves, (self.dout, self.dS_out), allow_unused=True, materialize_grads=True
        )


class ByAutograd(Recurrence):
    """The oracle as an op that writes `run` and nothing else (but that its state is complex)."""

    def state_shape(self, x):
        return CHANNELS, WIDTH

    def zero_state(self, x, segments):
        return x[1].new_zeros(segments.num_parts, CHANNELS, WIDTH)

    def run(self, x, segments, S_in=None):
        return diagonal_ssm(*x, segments, S_in)

    def linear_from_vjp(self, vjp, offset):
        return Scale.from_vjp(vjp, offset, axes=2)


@pytest.mark.parametrize("slab", (1, 150, 1 << 22))
@pytest.mark.parametrize("is_complex", (False, True))
@pytest.mark.parametrize("stream", STREAMS)
def test_chunks_equal_tokens(
    stream: str, is_complex: bool, slab: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "SLAB_ELEMENTS", slab)
    case = Case(stream, is_complex, generator)
    oracle = diagonal_ssm(*case.x, case.segments, case.S_in)
    found = DiagonalSSM(CHUNK).run(case.x, case.segments, case.S_in)
    assert found[0].is_complex() == is_complex
    for name, a, b in zip(("out", "S_out"), found, oracle):
        assert_close(a, b, name)
    for name, a, b in zip(NAMES, case.gradients(*found), case.gradients(*oracle)):
        assert_close(a, b, name)


@pytest.mark.parametrize("is_complex", (False, True))
@pytest.mark.parametrize("stream", ["continued", "documents", "parts, one empty"])
def test_derived_phases_equal_written_ones(stream: str, is_complex: bool, generator: torch.Generator) -> None:
    case = Case(stream, is_complex, generator)
    derived, written = ByAutograd(), DiagonalSSM(CHUNK)
    fixed = tuple(tensor.detach() for tensor in case.x)
    a, b = derived.summarize(fixed, case.segments).maps, written.summarize(fixed, case.segments).maps
    assert_close(a.offset, b.offset, "U")
    whole = [part for part, cut in enumerate(case.segments.cuts) if not cut]
    assert_close(a.apply(case.S_in).detach()[whole], b.apply(case.S_in).detach()[whole], "M S + U")
    results = [
        scan(op, case.x, case.segments, EachPart(case.segments), case.S_in, want_end=True) for op in (derived, written)
    ]
    gradients = [case.gradients(*result) for result in results]
    for name, left, right in zip(NAMES, *gradients):
        assert_close(left, right, name)


def test_only_states_are_sent(generator: torch.Generator) -> None:
    case = Case("two parts", False, generator)
    maps = DiagonalSSM(CHUNK).summarize(case.x, case.segments).maps
    assert isinstance(maps.linear, Constant)
    assert maps.pack().shape == (2, 2 * CHANNELS * WIDTH)


@pytest.mark.parametrize("is_complex", (False, True))
def test_one_token_steps_equal_the_run(is_complex: bool, generator: torch.Generator) -> None:
    case = Case("one", is_complex, generator)
    op = DiagonalSSM(CHUNK)
    out, S_out = op.run(case.x, case.segments)
    x, log_decay, c = case.x
    S, steps = torch.zeros_like(S_out[0]), []
    for t in range(case.segments.num_tokens):
        o, S = op.step((x[t : t + 1], log_decay, c), S)
        steps.append(o)
    assert_close(torch.cat(steps), out, "out")
    assert_close(S, S_out[0], "S_out")


def test_no_bit_of_another_document_arrives(generator: torch.Generator) -> None:
    case = Case("documents", False, generator)
    op = DiagonalSSM(CHUNK)
    edited = case.x[0].detach().clone()
    edited[5:40] *= 1.7

    def results(x: torch.Tensor) -> list[torch.Tensor]:
        leaf = x.detach().clone().requires_grad_()
        out, S_out = op.run((leaf, *case.x[1:]), case.segments, case.S_in.detach())
        return [out, *torch.autograd.grad((out.square().sum(), S_out), leaf, (None, case.dS_out))]

    for name, a, b in zip(("out", "dx"), results(case.x[0]), results(edited)):
        assert_bitwise_equal(a[:5], b[:5], name)
        assert_bitwise_equal(a[40:], b[40:], name)
        assert not torch.equal(a[5:40], b[5:40]), f"{name} does not depend on its own document"


def test_float32_with_constants_that_remember(generator: torch.Generator) -> None:
    case = Case("documents", False, generator)
    op = DiagonalSSM(CHUNK)
    x, log_decay, c, S_in = (
        leaf.detach().to(torch.complex64 if leaf.is_complex() else torch.float32).requires_grad_()
        for leaf in case.leaves
    )
    wide = [
        leaf.detach().to(torch.promote_types(leaf.dtype, torch.float64)).requires_grad_()
        for leaf in (x, log_decay, c, S_in)
    ]
    exact = diagonal_ssm(*wide[:3], case.segments, wide[3])
    exact_gradients = torch.autograd.grad(exact, wide, (case.dout, case.dS_out))
    out, S_out = op.run((x, log_decay, c), case.segments, S_in)
    gradients = torch.autograd.grad((out, S_out), (x, log_decay, c, S_in), (case.dout.float(), case.dS_out.cfloat()))
    for name, a, b in zip(("out", "S_out", *NAMES), (out, S_out, *gradients), (*exact, *exact_gradients)):
        assert_close(a, b.to(a.dtype), name)
