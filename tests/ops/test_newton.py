"""The affine recurrence of Newton's method against its token-by-token oracle."""

import pytest
import torch

from longhaul.models.ops.affine import Dense, Scale
from longhaul.models.ops.newton.chunk import AffineScan
from longhaul.models.ops.newton.naive import affine_scan
from longhaul.models.ops.segments import Documents, Segments
from tests.harness.numerics import assert_bitwise_equal, assert_close

CHANNELS, BLOCK, CHUNK = 3, 2, 4
STREAMS = {
    "one": ((0, 70), 0, [(0, 70)]),  # chunks of chunks of chunks
    "continued": ((0, 70), 5, [(0, 70)]),
    "whole chunks": ((0, 64), 0, [(0, 64)]),
    "less than a chunk": ((0, 3), 2, [(0, 3)]),
    "documents": ((0, 3, 5, 40, 41, 70), 2, [(0, 70)]),
    "parts, one empty": ((0, 3, 5, 40, 41, 70), 2, [(0, 17), (17, 17), (41, 70)]),
    "nothing": ((0,), 0, [(0, 0)]),
}
KINDS = ("diagonal", "blocks")


class Case:
    """Maps that neither forget nor grow: signed multipliers near one, blocks near rotations."""

    def __init__(self, stream: str, kind: str, generator: torch.Generator) -> None:
        bounds, first, parts = STREAMS[stream]
        self.segments = Segments(Documents(bounds, first), parts)
        T, N = self.segments.num_tokens, self.segments.num_parts

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        if kind == "diagonal":
            self.A = normal(T, CHANNELS).sign() * (1 + 0.01 * normal(T, CHANNELS))
        else:
            angle = normal(T, CHANNELS)
            rows = [torch.stack([angle.cos(), -angle.sin()], -1), torch.stack([angle.sin(), angle.cos()], -1)]
            self.A = torch.stack(rows, -2) + 0.01 * normal(T, CHANNELS, BLOCK, BLOCK)
        shape = (CHANNELS,) if kind == "diagonal" else (CHANNELS, BLOCK, 1)
        self.b, self.S_in = normal(T, *shape), normal(N, *shape)
        self.dout, self.dS_out = normal(T, *shape), normal(N, *shape)
        self.leaves = [self.A, self.b, self.S_in]
        for leaf in self.leaves:
            leaf.requires_grad_()

    def gradients(self, out: torch.Tensor, S_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(
            (out, S_out), self.leaves, (self.dout, self.dS_out), allow_unused=True, materialize_grads=True
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", STREAMS)
def test_chunks_equal_tokens(stream: str, kind: str, generator: torch.Generator) -> None:
    case = Case(stream, kind, generator)
    oracle = affine_scan(case.A, case.b, case.segments, case.S_in)
    found = AffineScan(CHUNK).run((case.A, case.b), case.segments, case.S_in)
    for name, a, b in zip(("out", "S_out"), found, oracle):
        assert_close(a, b, name)
    expected = case.gradients(*oracle) if oracle[0].requires_grad else [torch.zeros_like(x) for x in case.leaves[:2]]
    for name, a, b in zip(("dA", "db", "dS_in"), case.gradients(*found), expected):
        assert_close(a, b, name)


@pytest.mark.parametrize("kind", KINDS)
def test_maps_of_parts(kind: str, generator: torch.Generator) -> None:
    case = Case("continued", kind, generator)
    maps = AffineScan(CHUNK).summarize((case.A, case.b), case.segments).maps
    assert isinstance(maps.linear, Scale if kind == "diagonal" else Dense)
    assert_close(maps.apply(case.S_in), affine_scan(case.A, case.b, case.segments, case.S_in)[1], "M S + U")


@pytest.mark.parametrize("kind", KINDS)
def test_one_token_steps_equal_the_run(kind: str, generator: torch.Generator) -> None:
    case = Case("one", kind, generator)
    op = AffineScan(CHUNK)
    out, S_out = op.run((case.A, case.b), case.segments)
    S, steps = torch.zeros_like(S_out[0]), []
    for t in range(case.segments.num_tokens):
        o, S = op.step((case.A[t : t + 1], case.b[t : t + 1]), S)
        steps.append(o)
    assert_close(torch.cat(steps), out, "out")
    assert_close(S, S_out[0], "S_out")


@pytest.mark.parametrize("kind", KINDS)
def test_no_bit_of_another_document_arrives(kind: str, generator: torch.Generator) -> None:
    case = Case("documents", kind, generator)
    op, changed = AffineScan(CHUNK), slice(5, 40)

    def results(scale: float) -> list[torch.Tensor]:
        leaves = [tensor.detach().clone() for tensor in (case.A, case.b)]
        for leaf in leaves:
            leaf[changed] *= scale
            leaf.requires_grad_()
        out, S_out = op.run(tuple(leaves), case.segments, case.S_in.detach())
        return [out, *torch.autograd.grad((out, S_out), leaves, (case.dout, case.dS_out))]

    for name, a, b in zip(("out", "dA", "db"), results(1.0), results(1.7)):
        assert_bitwise_equal(a[:5], b[:5], name)
        assert_bitwise_equal(a[40:], b[40:], name)


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision(kind: str, generator: torch.Generator) -> None:
    case = Case("documents", kind, generator)
    exact = case.gradients(*affine_scan(case.A, case.b, case.segments, case.S_in))
    single = [leaf.detach().float().requires_grad_() for leaf in case.leaves]
    found = AffineScan(CHUNK).run((single[0], single[1]), case.segments, single[2])
    gradients = torch.autograd.grad(found, single, (case.dout.float(), case.dS_out.float()))
    for name, a, b in zip(("dA", "db", "dS_in"), gradients, exact):
        assert_close(a, b.float(), name)
