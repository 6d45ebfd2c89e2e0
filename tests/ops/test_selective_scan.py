"""The selective scan against its token-by-token oracle, and the phases a base class derives."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longhaul.models.ops.affine import LogScale
from longhaul.models.ops.recurrence import EachPart, Recurrence, scan
from longhaul.models.ops.segments import Documents, Segments
from longhaul.models.ops.selective_scan import SelectiveScan, passes
from longhaul.models.ops.selective_scan.naive import selective_scan
from tests.harness.numerics import assert_bitwise_equal, assert_close

CHANNELS, WIDTH, CHUNK = 6, 3, 8
NAMES = ("dx", "ddt", "dA", "dB", "dC", "dS_in")
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
    """Inputs whose slowest entries remember ten lengths and more, beside fast ones."""

    def __init__(self, stream: str, generator: torch.Generator) -> None:
        bounds, first, parts = STREAMS[stream]
        self.segments = Segments(Documents(bounds, first), parts)
        T, N = self.segments.num_tokens, self.segments.num_parts

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        dt = 1e-3 * 10.0 ** torch.rand(T, CHANNELS, generator=generator, dtype=torch.float64)  # 0.001 to 0.01
        A = -torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64) * (1 + torch.rand(CHANNELS, 1, generator=generator))
        self.x = (normal(T, CHANNELS), dt, A, normal(T, WIDTH), normal(T, WIDTH))
        self.S_in = normal(N, CHANNELS, WIDTH)
        self.dout, self.dS_out = normal(T, CHANNELS), normal(N, CHANNELS, WIDTH)
        self.leaves = [*self.x, self.S_in]
        for leaf in self.leaves:
            leaf.requires_grad_()

    def gradients(self, out: torch.Tensor, S_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(
            (out, S_out), self.leaves, (self.dout, self.dS_out), allow_unused=True, materialize_grads=True
        )


class ByAutograd(Recurrence):
    """The oracle as an op that writes `run` and nothing else."""

    def state_shape(self, x):
        return CHANNELS, WIDTH

    def run(self, x, segments, S_in=None):
        return selective_scan(*x, segments, S_in)

    def linear_from_vjp(self, vjp, offset):
        return LogScale.from_vjp(vjp, offset, axes=2)


@pytest.mark.parametrize("slab", (1, 40, 1 << 17))
@pytest.mark.parametrize("stream", STREAMS)
def test_chunks_equal_tokens(
    stream: str, slab: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "SLAB_ELEMENTS", slab)
    case = Case(stream, generator)
    oracle = selective_scan(*case.x, case.segments, case.S_in)
    found = SelectiveScan(CHUNK).run(case.x, case.segments, case.S_in)
    for name, a, b in zip(("out", "S_out"), found, oracle):
        assert_close(a, b, name)
    for name, a, b in zip(NAMES, case.gradients(*found), case.gradients(*oracle)):
        assert_close(a, b, name)


@pytest.mark.parametrize("stream", ["continued", "documents", "parts, one empty"])
def test_derived_phases_equal_written_ones(stream: str, generator: torch.Generator) -> None:
    case = Case(stream, generator)
    derived, written = ByAutograd(), SelectiveScan(CHUNK)
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


def test_one_token_steps_equal_the_run(generator: torch.Generator) -> None:
    case = Case("one", generator)
    op = SelectiveScan(CHUNK)
    out, S_out = op.run(case.x, case.segments)
    x, dt, A, B, C = case.x
    S, steps = torch.zeros_like(S_out[0]), []
    for t in range(case.segments.num_tokens):
        one = slice(t, t + 1)
        o, S = op.step((x[one], dt[one], A, B[one], C[one]), S)
        steps.append(o)
    assert_close(torch.cat(steps), out, "out")
    assert_close(S, S_out[0], "S_out")


def test_no_bit_of_another_document_arrives(generator: torch.Generator) -> None:
    case = Case("documents", generator)
    op, changed = SelectiveScan(CHUNK), slice(5, 40)
    x = [tensor.detach().clone() for tensor in case.x]
    edited = [tensor.clone() for tensor in x]
    for index in (0, 1, 3, 4):
        edited[index][changed] *= 1.7

    def results(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        out, S_out = op.run(tuple(leaves), case.segments, case.S_in.detach())
        gradients = torch.autograd.grad((out, S_out), leaves, (case.dout, case.dS_out))
        return [out, *(gradients[index] for index in (0, 1, 3, 4))]

    for name, a, b in zip(("out", "dx", "ddt", "dB", "dC"), results(x), results(edited)):
        assert_bitwise_equal(a[:5], b[:5], name)
        assert_bitwise_equal(a[40:], b[40:], name)
        assert not torch.equal(a[5:40], b[5:40]), f"{name} does not depend on its own document"


def test_float32_with_gates_that_remember(generator: torch.Generator) -> None:
    case = Case("documents", generator)
    op = SelectiveScan(CHUNK)
    exact = case.gradients(*op.run(case.x, case.segments, case.S_in))
    single = [leaf.detach().float().requires_grad_() for leaf in case.leaves]
    out, S_out = op.run(tuple(single[:-1]), case.segments, single[-1])
    gradients = torch.autograd.grad((out, S_out), single, (case.dout.float(), case.dS_out.float()))
    for name, a, b in zip(NAMES, gradients, exact):
        assert_close(a, b.float(), name)


def test_a_fast_decay_neither_overflows_nor_loses_the_slow_one(generator: torch.Generator) -> None:
    case = Case("one", generator)
    with torch.no_grad():
        case.x[2][:, 2] = -1e6  # forgets all at every token: exp(-sum) would overflow as a divisor
    oracle = selective_scan(*case.x, case.segments, case.S_in)
    found = SelectiveScan(CHUNK).run(case.x, case.segments, case.S_in)
    for name, a, b in zip(("out", "S_out"), found, oracle):
        assert_close(a, b, name)
    for name, a, b in zip(NAMES, case.gradients(*found), case.gradients(*oracle)):
        assert_close(a, b, name)


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor any operation returned."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return out


def test_the_states_of_all_tokens_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "SLAB_ELEMENTS", 1 << 8)
    T, D, K, chunk = 2048, 8, 16, 16
    x, dt = torch.randn(T, D, requires_grad=True), torch.rand(T, D, requires_grad=True)
    A, B, C = -torch.rand(D, K), torch.randn(T, K), torch.randn(T, K)
    with Largest() as largest:
        out, _ = SelectiveScan(chunk).run((x, dt, A, B, C), Segments(Documents((0, T)), [(0, T)]))
        out.sum().backward()
    assert largest.entries == T * K  # an input; the states of all chunks are T D K / chunk
