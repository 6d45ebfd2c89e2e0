"""The fold that every exchange is compared with, itself compared with tokens one by one."""

import pytest
import torch

from longhaul.models.ops.affine import AffineMap, Dense
from longhaul.models.ops.chain import Link, fold
from tests.parallel.toy_maps import H, K, V, make_maps, make_states

T = 11


def _tokens(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """`S_t = A_t S_{t-1} + b_t` for T tokens."""
    A = torch.linalg.qr(torch.randn(T, H, K, K, generator=generator, dtype=torch.float64)).Q
    return A, torch.randn(T, H, K, V, generator=generator, dtype=torch.float64)


def _part(A: torch.Tensor, b: torch.Tensor, start: int, stop: int, documents: set[int]) -> AffineMap:
    """The map of tokens `start .. stop`; from the last document's start, if one starts there."""
    M, U = torch.eye(K, dtype=torch.float64).expand(H, K, K), torch.zeros(H, K, V, dtype=torch.float64)
    for t in range(start, stop):
        if t in documents:
            U = torch.zeros_like(U)
        M, U = A[t] @ M, A[t] @ U + b[t]
    return AffineMap(U[None], Dense(M[None]))


def _stack(maps: list[AffineMap]) -> AffineMap:
    matrices = [maps_.linear.matrix for maps_ in maps if isinstance(maps_.linear, Dense)]
    return AffineMap(torch.cat([maps_.offset for maps_ in maps]), Dense(torch.cat(matrices)))


@pytest.mark.parametrize("documents", [set(), {0}, {0, 4}, {0, 6, 7}, {2, 9, 10}, set(range(T))], ids=str)
@pytest.mark.parametrize("with_initial", [False, True])
def test_forward_is_the_recurrence(documents: set[int], with_initial: bool, generator: torch.Generator) -> None:
    (A, b), bounds = _tokens(generator), (0, 4, 4, 7, 10, T)
    initial = torch.randn(H, K, V, generator=generator, dtype=torch.float64) if with_initial else None
    state = torch.zeros(H, K, V, dtype=torch.float64) if initial is None else initial
    before = []  # the state each token reads
    for t in range(T):
        if t in documents:
            state = torch.zeros_like(state)
        before.append(state)
        state = A[t] @ state + b[t]
    chain, maps = [], []
    for k, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        starts = [t for t in range(start, stop) if t in documents]
        tail = stop - starts[-1] if starts else stop - start
        chain.append(Link(k, 0, stop - start, tail, bool(starts), start not in documents or start == stop))
        maps.append(_part(A, b, start, stop, documents))
    entering, end = fold(_stack(maps), chain, initial)
    for k, start in enumerate(bounds[:-1]):
        if chain[k].length:
            torch.testing.assert_close(entering[k], before[start], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(end, state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["log_key", "scale_complex", "dense_complex"])
@pytest.mark.parametrize("cut", [None, 0, 2, 3])
def test_reverse_is_the_adjoint_of_forward(kind: str, cut: int | None, generator: torch.Generator) -> None:
    """<d(entering, end), (C, G)>: what autograd finds through the forward fold is the reverse fold."""
    maps = make_maps(kind, (2, 3, 1, 4), generator)
    chain = [Link(k, 0, 1, 1, k == cut, True) for k in range(4)]
    C, G = make_states(kind, 4, generator), make_states(kind, 1, generator)[0]
    offset, initial = maps.offset.requires_grad_(), make_states(kind, 1, generator)[0].requires_grad_()
    entering, end = fold(maps, chain, initial)
    objective = (C.conj() * entering).sum().real + (G.conj() * end).sum().real
    d_offset, d_initial = torch.autograd.grad(objective, (offset, initial))
    # A part's offset is added to what leaves it, so its gradient is the cotangent at the part's exit.
    leaving, start = fold(maps.adjoint(C), chain, G, reverse=True)
    torch.testing.assert_close(leaving, d_offset, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(start, d_initial, rtol=1e-12, atol=1e-12)


def test_a_part_that_starts_a_document_reads_zero(generator: torch.Generator) -> None:
    maps = make_maps("dense", (2, 3), generator)
    chain = [Link(0, 0, 2, 2, False, True), Link(1, 0, 3, 3, True, False)]
    entering, end = fold(maps, chain, make_states("dense", 1, generator)[0])
    assert not entering[1].any()
    torch.testing.assert_close(end, maps.offset[1])
