"""Laws of affine maps, for every kind of linear part, in float64."""

import pytest
import torch

from longhaul.models.ops.affine import (
    AffineMap,
    Constant,
    Dense,
    Identity,
    Linear,
    LogScale,
    Scale,
    accumulate_dtype,
)
from tests.harness.numerics import assert_bitwise_equal, assert_close
from tests.parallel.toy_maps import KINDS, H, K, V, make_linear, make_maps, make_states

LENGTHS = (3, 0, 7, 1)
every_kind = pytest.mark.parametrize("kind", KINDS)


def _matrices(linear: Linear, kind: str) -> torch.Tensor:
    """M written out on flattened states, [N, H K V, H K V], by acting on every unit state."""
    units = torch.eye(H * K * V, dtype=make_states(kind, 1, torch.Generator()).dtype).reshape(-1, 1, H, K, V)
    columns = [linear.act(unit.expand(len(LENGTHS), H, K, V)).reshape(len(LENGTHS), -1) for unit in units]
    return torch.stack(columns, dim=-1)


def _assert_same(actual: AffineMap, expected: AffineMap, kind: str, name: str) -> None:
    assert_close(actual.offset, expected.offset, f"{name}: U")
    assert_close(_matrices(actual.linear, kind), _matrices(expected.linear, kind), f"{name}: M")


def test_kinds_do_to_a_state_what_they_say(generator: torch.Generator) -> None:
    """`act` against formulas in other words, entry by entry."""
    state = make_states("dense", 4, generator)
    for kind in KINDS:
        linear, x = make_linear(kind, LENGTHS, generator), make_states(kind, 4, generator)
        acted = linear.act(x)
        for n, h, k, v in torch.cartesian_prod(*(torch.arange(s) for s in state.shape)).tolist():
            at = (h, k, v)
            if isinstance(linear, Identity):
                expected = x[n, h, k, v]
            elif isinstance(linear, Constant):
                expected = linear.log_decay[at[: linear.log_decay.dim()]].exp() ** LENGTHS[n] * x[n, h, k, v]
            elif isinstance(linear, LogScale):
                expected = linear.value[(n, *at)[: linear.value.dim()]].exp() * x[n, h, k, v]
            elif isinstance(linear, Scale):
                expected = linear.value[(n, *at)[: linear.value.dim()]] * x[n, h, k, v]
            else:
                assert isinstance(linear, Dense)
                expected = sum(linear.matrix[n, h, k, j] * x[n, h, j, v] for j in range(K))
            assert_close(acted[n, h, k, v], torch.as_tensor(expected), f"{kind} at {n, h, k, v}", dtype=torch.float64)


@every_kind
def test_composition(kind: str, generator: torch.Generator) -> None:
    first, second, third = (make_maps(kind, LENGTHS, generator) for _ in range(3))
    state = make_states(kind, 4, generator)
    assert_close(second.compose(first).apply(state), second.apply(first.apply(state)), "apply of a composition")
    _assert_same(third.compose(second).compose(first), third.compose(second.compose(first)), kind, "associativity")
    one = make_maps(kind, (0,) * 4, generator)
    assert_close(one.apply(state), state, "identity")
    _assert_same(one.compose(first), first, kind, "identity after")
    _assert_same(first.compose(one), first, kind, "identity before")


@every_kind
def test_one_state_enters_all_maps(kind: str, generator: torch.Generator) -> None:
    maps, state = make_maps(kind, LENGTHS, generator), make_states(kind, 1, generator)
    assert_close(maps.apply(state), maps.apply(state.expand(4, -1, -1, -1)), "broadcast")


@every_kind
def test_adjoint(kind: str, generator: torch.Generator) -> None:
    maps, state, cotangent = make_maps(kind, LENGTHS, generator), *(make_states(kind, 4, generator) for _ in range(2))
    C = make_states(kind, 4, generator)
    adjoint = maps.adjoint(C)
    left = (maps.linear.act(state).conj() * cotangent).sum(dim=(1, 2, 3))
    right = (state.conj() * adjoint.linear.act(cotangent)).sum(dim=(1, 2, 3))
    assert_close(right, left, "<M S, G> = <S, M^H G>")
    assert_close(_matrices(adjoint.linear, kind), _matrices(maps.linear, kind).mH, "M^H")
    assert_close(adjoint.apply(cotangent), maps.linear.adjoint().act(cotangent) + C, "M^H G + C")
    assert_close(_matrices(adjoint.linear.adjoint(), kind), _matrices(maps.linear, kind), "adjoint twice")
    later = make_maps(kind, LENGTHS, generator)
    product = later.linear.after(maps.linear).adjoint()
    assert_close(_matrices(product, kind), _matrices(maps.linear.adjoint().after(later.linear.adjoint()), kind), "(ML)^H")


@every_kind
def test_adjoint_is_what_autograd_finds(kind: str, generator: torch.Generator) -> None:
    maps, cotangent = make_maps(kind, LENGTHS, generator), make_states(kind, 4, generator)
    state = make_states(kind, 4, generator).requires_grad_()
    (found,) = torch.autograd.grad(maps.apply(state), state, cotangent)
    assert_close(maps.linear.adjoint().act(cotangent), found, "M^H G")


@every_kind
@pytest.mark.parametrize("reverse", [False, True])
def test_pack_and_unpack(kind: str, reverse: bool, generator: torch.Generator) -> None:
    lengths = (2, 9)
    here, there = make_maps(kind, LENGTHS, generator), make_maps(kind, lengths, generator)
    if reverse:
        here, there = here.adjoint(here.offset), there.adjoint(there.offset)
    payload = there.pack()
    assert payload.shape[0] == 2 and payload.dtype is torch.float64 and payload.is_contiguous()
    # Maps of another rank, of other number and lengths, of which this rank has only the payload.
    unpacked = here.unpack(payload.clone(), lengths)
    state = make_states(kind, 2, generator)
    assert_bitwise_equal(unpacked.offset, there.offset, "U")
    assert_close(unpacked.apply(state), there.apply(state), "M S + U")
    assert payload.numel() == 0 or unpacked.pack().shape == payload.shape
    none = here.unpack(payload[:0], ())
    assert none.num_maps == 0


@pytest.mark.parametrize("kind", ["identity", "constant", "constant_complex"])
def test_known_kinds_send_nothing_but_the_offset(kind: str, generator: torch.Generator) -> None:
    maps = make_maps(kind, LENGTHS, generator)
    assert maps.linear.pack(4) is None
    assert maps.pack().shape[1] == H * K * V * (2 if maps.offset.is_complex() else 1)


@every_kind
@pytest.mark.parametrize("blocks", [1, 2, 3, V, V + 2])
def test_split_along_the_values(kind: str, blocks: int, generator: torch.Generator) -> None:
    maps, state = make_maps(kind, LENGTHS, generator), make_states(kind, 4, generator)
    pieces, states = maps.split(blocks), state.tensor_split(blocks, dim=-1)
    assert len(pieces) == blocks
    joined = torch.cat([piece.apply(part) for piece, part in zip(pieces, states)], dim=-1)
    assert_close(joined, maps.apply(state), "pieces together")
    # A piece travels, composes and turns round by itself, an empty one (the last, if there are more than values) too.
    earlier = make_maps(kind, LENGTHS, generator).split(blocks)
    lengths = [2 * length for length in LENGTHS]
    for piece, before, part in zip(pieces, earlier, states):
        both = piece.compose(before)
        assert_close(both.unpack(both.pack(), lengths).apply(part), piece.apply(before.apply(part)), "a piece")


@every_kind
def test_select(kind: str, generator: torch.Generator) -> None:
    maps, index = make_maps(kind, LENGTHS, generator), [2, 0, 2]
    state = make_states(kind, 4, generator)
    assert_close(maps.select(index).apply(state[index]), maps.apply(state)[index], "selected")
    assert maps.select([]).num_maps == 0


def _from_vjp(linear: Linear, offset: torch.Tensor) -> Linear:
    def vjp(cotangent: torch.Tensor) -> torch.Tensor:
        state = torch.zeros_like(offset, requires_grad=True)
        return torch.autograd.grad(linear.act(state), state, cotangent)[0]

    if isinstance(linear, (LogScale, Scale)):
        return type(linear).from_vjp(vjp, offset, linear.value.dim() - 1)
    assert isinstance(linear, (Identity, Dense))
    return type(linear).from_vjp(vjp, offset)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("constant")])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("values", [V, 1, 2])
def test_from_vjp(kind: str, strided: bool, values: int, generator: torch.Generator) -> None:
    """The linear part is found from products with it, also if the offset lies in memory in another order."""
    maps = make_maps(kind, LENGTHS, generator).split(V)[0] if values == 1 else make_maps(kind, LENGTHS, generator)
    offset, linear = maps.offset, maps.linear
    if values == 2:
        offset, linear = offset[..., :2], linear.columns(0, 2, 4)
    if strided:
        offset = offset.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    found = _from_vjp(linear, offset)
    assert type(found) is type(linear)
    state = make_states(kind, 4, generator)[..., :values]
    assert_close(found.act(state), linear.act(state), "M S")


def test_log_scale_survives_products_that_underflow() -> None:
    """exp(-600) twice is zero in float64; their sum, undone by nothing, must still compose with a log of +1100."""
    down = LogScale(torch.full((1, H), -600.0, dtype=torch.float64))
    up = LogScale(torch.full((1, H), 1199.0, dtype=torch.float64))
    state = torch.ones(1, H, K, V, dtype=torch.float64)
    assert_close(up.after(down.after(down)).act(state), state * torch.tensor(-1.0, dtype=torch.float64).exp(), "e^-1")


@pytest.mark.parametrize("wide", [False, True])
def test_small_blocks(wide: bool, generator: torch.Generator) -> None:
    """Dense blocks [N, D, b, b] on states [D, b, 1]: all columns of M from one value column."""
    D, b = 6, 3
    matrix = torch.randn(2, D, b, b, generator=generator, dtype=torch.float64)
    linear, state = Dense(matrix), torch.randn(2, D, b, 2 if wide else 1, generator=generator, dtype=torch.float64)
    assert_close(linear.act(state), torch.einsum("ndij,ndjv->ndiv", matrix, state), "M S")
    found = _from_vjp(linear, state)
    assert isinstance(found, Dense)
    assert_close(found.matrix, matrix, "M")


def test_accumulate_dtype() -> None:
    for dtype, expected in {
        torch.bfloat16: torch.float32,
        torch.float16: torch.float32,
        torch.float32: torch.float32,
        torch.float64: torch.float64,
        torch.complex64: torch.complex64,
    }.items():
        assert accumulate_dtype(dtype) is expected
