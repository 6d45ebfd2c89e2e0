"""The scalar-decay recurrence against its token-by-token oracle, and the phases a base class derives."""

import pytest
import torch

from longhaul.models.ops.affine import Constant, Identity, LogScale
from longhaul.models.ops.recurrence import EachPart, Recurrence, scan
from longhaul.models.ops.scalar_decay.chunk import ScalarDecay
from longhaul.models.ops.scalar_decay.naive import scalar_decay
from longhaul.models.ops.segments import Documents, Segments
from tests.harness.cases import slow_log_decay
from tests.harness.numerics import assert_bitwise_equal, assert_close

WIDTH_K, WIDTH_V, CHUNK = 3, 5, 16
HEADS = 4
STREAMS = {
    "one": ((0, 70), 0, [(0, 70)]),
    "continued": ((0, 70), 5, [(0, 70)]),
    "whole chunks": ((0, 64), 0, [(0, 64)]),
    "documents": ((0, 3, 5, 40, 41, 70), 2, [(0, 70)]),
    "parts, one empty": ((0, 3, 5, 40, 41, 70), 2, [(0, 17), (17, 17), (41, 70)]),
    "two parts": ((0, 70), 3, [(10, 30), (40, 70)]),
    "nothing": ((0,), 0, [(0, 0)]),
}
DECAYS = ("none", "constant", "data")


class Case:
    def __init__(self, stream: str, decay: str, groups: int, generator: torch.Generator, heads: int = HEADS) -> None:
        bounds, first, parts = STREAMS[stream]
        self.segments = Segments(Documents(bounds, first), parts)
        T, N = self.segments.num_tokens, self.segments.num_parts

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.q, self.k = normal(T, groups, WIDTH_K), normal(T, groups, WIDTH_K)
        self.v, self.S_in = normal(T, heads, WIDTH_V), normal(N, heads, WIDTH_K, WIDTH_V)
        self.dout, self.dS_out = normal(T, heads, WIDTH_V), normal(N, heads, WIDTH_K, WIDTH_V)
        self.constant = slow_log_decay(1, heads, generator)[0] if decay == "constant" else None
        self.data = slow_log_decay(T, heads, generator) if decay == "data" else None
        self.leaves = [x for x in (self.q, self.k, self.v, self.S_in, self.data) if x is not None]
        for leaf in self.leaves:
            leaf.requires_grad_()

    def gradients(self, out: torch.Tensor, S_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(
            (out, S_out), self.leaves, (self.dout, self.dS_out), allow_unused=True, materialize_grads=True
        )


class ByAutograd(Recurrence):
    """The oracle as an op that writes `run` and nothing else."""

    def __init__(self, decay: str, constant: torch.Tensor | None) -> None:
        self.decay, self.constant = decay, constant

    def state_shape(self, x):
        return HEADS, WIDTH_K, WIDTH_V

    def run(self, x, segments, S_in=None):
        q, k, v, data = x
        return scalar_decay(q, k, v, self.constant if data is None else data, segments, S_in)

    def linear_from_vjp(self, vjp, offset):
        return Identity.from_vjp(vjp, offset) if self.decay == "none" else LogScale.from_vjp(vjp, offset, axes=1)


@pytest.mark.parametrize("groups, heads", [(1, 4), (2, 4), (4, 4), (1, 1)])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("stream", STREAMS)
def test_chunks_equal_tokens(stream: str, decay: str, groups: int, heads: int, generator: torch.Generator) -> None:
    case = Case(stream, decay, groups, generator, heads)
    oracle = scalar_decay(
        case.q, case.k, case.v, case.constant if case.data is None else case.data, case.segments, case.S_in
    )
    found = ScalarDecay(case.constant, CHUNK).run((case.q, case.k, case.v, case.data), case.segments, case.S_in)
    for name, a, b in zip(("out", "S_out"), found, oracle):
        assert_close(a, b, name)
    for name, a, b in zip(("dq", "dk", "dv", "dS_in", "dlog_decay"), case.gradients(*found), case.gradients(*oracle)):
        assert_close(a, b, name)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("stream", ["continued", "documents", "parts, one empty"])
def test_derived_phases_equal_written_ones(stream: str, decay: str, generator: torch.Generator) -> None:
    case = Case(stream, decay, 2, generator)
    x = (case.q, case.k, case.v, case.data)
    derived, written = ByAutograd(decay, case.constant), ScalarDecay(case.constant, CHUNK)
    a, b = derived.summarize(x, case.segments).maps, written.summarize(x, case.segments).maps
    assert_close(a.offset, b.offset, "U")
    whole = [part for part, cut in enumerate(case.segments.cuts) if not cut]
    assert_close(a.apply(case.S_in).detach()[whole], b.apply(case.S_in).detach()[whole], "M S + U")
    results = [
        scan(op, x, case.segments, EachPart(case.segments), case.S_in, want_end=True) for op in (derived, written)
    ]
    gradients = [case.gradients(*result) for result in results]
    for name, left, right in zip(("dq", "dk", "dv", "dS_in", "dlog_decay"), *gradients):
        assert_close(left, right, name)


def test_constant_decay_is_not_sent(generator: torch.Generator) -> None:
    case = Case("two parts", "constant", 1, generator)
    maps = ScalarDecay(case.constant, CHUNK).summarize((case.q, case.k, case.v, None), case.segments).maps
    assert isinstance(maps.linear, Constant)
    assert maps.pack().shape == (2, HEADS * WIDTH_K * WIDTH_V)


@pytest.mark.parametrize("decay", DECAYS)
def test_one_token_steps_equal_the_run(decay: str, generator: torch.Generator) -> None:
    case = Case("one", decay, 2, generator)
    op = ScalarDecay(case.constant, CHUNK)
    out, S_out = op.run((case.q, case.k, case.v, case.data), case.segments)
    S, steps = torch.zeros_like(S_out[0]), []
    for t in range(case.segments.num_tokens):
        one = slice(t, t + 1)
        o, S = op.step((case.q[one], case.k[one], case.v[one], None if case.data is None else case.data[one]), S)
        steps.append(o)
    assert_close(torch.cat(steps), out, "out")
    assert_close(S, S_out[0], "S_out")


def test_no_bit_of_another_document_arrives(generator: torch.Generator) -> None:
    case = Case("documents", "data", 2, generator)
    op, changed = ScalarDecay(None, CHUNK), slice(5, 40)
    x = [tensor.detach().clone() for tensor in (case.q, case.k, case.v, case.data)]
    edited = [tensor.clone() for tensor in x]
    for tensor in edited:
        tensor[changed] *= 1.7

    def results(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        out, S_out = op.run(tuple(leaves), case.segments, case.S_in.detach())
        return [out, *torch.autograd.grad((out, S_out), leaves, (case.dout, case.dS_out))]

    for name, a, b in zip(("out", "dq", "dk", "dv", "dlog_decay"), results(x), results(edited)):
        assert_bitwise_equal(a[:5], b[:5], name)
        assert_bitwise_equal(a[40:], b[40:], name)


@pytest.mark.parametrize("strength", (1.0, 20.0, 120.0))
def test_float32_with_gates_that_forget(strength: float, generator: torch.Generator) -> None:
    case = Case("documents", "data", 2, generator)
    with torch.no_grad():
        case.data[10:30] -= strength  # no factor may overflow across a document's end
    exact = case.gradients(*scalar_decay(case.q, case.k, case.v, case.data, case.segments, case.S_in))
    single = [leaf.detach().float().requires_grad_() for leaf in case.leaves]
    q, k, v, S_in, data = single
    found = ScalarDecay(None, CHUNK).run((q, k, v, data), case.segments, S_in)
    gradients = torch.autograd.grad(found, single, (case.dout.float(), case.dS_out.float()))
    for name, a, b in zip(("dq", "dk", "dv", "dS_in", "dlog_decay"), gradients, exact):
        assert_close(a, b.float(), name)


def test_float32_with_gates_that_remember(generator: torch.Generator) -> None:
    case = Case("documents", "data", 1, generator)
    x = (case.q, case.k, case.v, case.data)
    op = ScalarDecay(None, CHUNK)
    exact = case.gradients(*op.run(x, case.segments, case.S_in))
    single = [leaf.detach().float().requires_grad_() for leaf in case.leaves]
    q, k, v, S_in, data = single
    out, S_out = op.run((q, k, v, data), case.segments, S_in)
    gradients = torch.autograd.grad((out, S_out), single, (case.dout.float(), case.dS_out.float()))
    for name, a, b in zip(("dq", "dk", "dv", "dS_in", "dlog_decay"), gradients, exact):
        assert_close(a, b.float(), name)
