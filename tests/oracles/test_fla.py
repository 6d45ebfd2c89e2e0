"""Our ops against the naive functions of flash-linear-attention: outputs, final states and every gradient, in float32.

Opt-in: it needs `pip install 'longhaul[fla]'`, whose triton no GPU has to back. Its kernels then take the place of torch's in
Hugging Face's layers, so the other oracles of this folder want an environment without it.

Run with flash-linear-attention 0.6.0 (fla-core 0.6.0, triton 3.9.0) on a CPU: all cases pass. There is no naive function of
its Lightning attention, Mamba-2, HGRN2 and RWKV-7; they stand under the recurrence that fla runs them by (simple GLA, GLA with
k = 1 - f, DPLR).

Legend: T tokens, H heads, K key width, V value width. fla's functions want [1, T, H, K] ("tokens first") or [1, H, T, K].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from longhaul.models.mixers.based import square_features, taylor_features
from longhaul.models.mixers.lightning import lightning_log_decay
from longhaul.models.mixers.retention import retention_log_decay
from longhaul.models.ops.delta_rule import DeltaRule, delta_inputs
from longhaul.models.ops.diagonal_decay import DiagonalDecay
from longhaul.models.ops.recurrence import Recurrence
from longhaul.models.ops.scalar_decay import ScalarDecay
from longhaul.models.ops.segments import Segments
from longhaul.models.sequence import Documents
from tests.harness.cases import slow_log_decay
from tests.harness.numerics import assert_close

Side = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor | None]]
REASON = "needs flash-linear-attention: pip install 'longhaul[fla]'"
T, H, K, V = 100, 2, 12, 16
SCALE = K**-0.5


class Pair(NamedTuple):
    """The same numbers twice: outputs [T, H, V] and the final state [H, K, V], or None where fla gives none."""

    theirs: Side
    op: Recurrence
    inputs: Callable[[dict[str, Tensor]], tuple[Tensor | None, ...]]
    normalise: bool = False


def naive(module: str, function: str) -> Any:
    return getattr(pytest.importorskip(f"fla.ops.{module}", reason=REASON), function)


def tokens_first(module: str, function: str, *names: str, **options: Any) -> Side:
    """A function of [1, T, H, ...] that takes and gives states."""

    def call(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        given = [x[name][None] for name in names]
        out, S = naive(module, function)(*given, initial_state=x["S"][None], output_final_state=True, **options)
        return out[0], S[0]

    return call


def heads_first(module: str, function: str, *names: str, stateful: bool = True, **options: Any) -> Side:
    """A function of [1, H, T, ...]; those without a state start from zero."""

    def call(x: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        given = [x[name] if x[name].shape[0] == H else x[name].transpose(0, 1)[None] for name in names]
        if not stateful:
            return naive(module, function)(*given, **options)[0].transpose(0, 1), None
        out, S = naive(module, function)(*given, initial_state=x["S"][None], output_final_state=True, **options)
        return out[0].transpose(0, 1), S[0]

    return call


def fixed_decay(log_decay: Tensor) -> Side:
    function = tokens_first("simple_gla.naive", "naive_recurrent_simple_gla", "q", "k", "v", "fixed")
    return lambda x: function({**x, "fixed": log_decay.float().expand(T, H)})


def dplr(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """RWKV-7: `diag(w) - kappa^T (a kappa)`, transposed as fla has it: the state reads with -kappa, writes with a kappa."""
    kappa = torch.nn.functional.normalize(x["k"], dim=-1)
    inputs = {**x, "alpha": -kappa, "rate": x["beta"][..., None] * kappa}
    names = "q", "k", "v", "alpha", "rate", "channels"
    return heads_first("generalized_delta_rule.dplr.naive", "dplr_recurrence", *names)(inputs)


def dplr_inputs(x: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
    kappa = torch.nn.functional.normalize(x["k"], dim=-1)
    read = -kappa * torch.exp(-x["channels"])
    return SCALE * x["q"], x["k"], x["v"], read, x["beta"][..., None] * kappa, x["channels"]


def unit(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**x, "k": torch.nn.functional.normalize(x["k"], dim=-1)}


def forget(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**x, "k": 1 - x["channels"].exp()}


RWKV6 = heads_first("rwkv6.recurrent_naive", "naive_recurrent_rwkv6", "q", "k", "v", "channels", "bonus")
GLA = tokens_first("gla.naive", "naive_recurrent_gla", "q", "k", "v", "channels")
DELTA = heads_first("delta_rule.naive", "delta_rule_recurrence", "q", "k", "v", "beta")
GATED = tokens_first("gated_delta_rule.naive", "naive_recurrent_gated_delta_rule", "q", "k", "v", "beta", "heads")
KDA = tokens_first("kda.naive", "naive_recurrent_kda", "q", "k", "v", "channels", "beta")
LIGHTNING, RETENTION = lightning_log_decay("alibi", H, 0, 1), retention_log_decay(H)

PAIRS = {
    "linear attention": Pair(
        tokens_first("linear_attn.naive", "naive_recurrent_linear_attn", "q", "k", "v"),
        ScalarDecay(chunk=16),
        lambda x: (SCALE * x["q"], x["k"], x["v"], None),
    ),
    "simple GLA (Mamba-2)": Pair(
        tokens_first("simple_gla.naive", "naive_recurrent_simple_gla", "q", "k", "v", "heads"),
        ScalarDecay(chunk=16),
        lambda x: (SCALE * x["q"], x["k"], x["v"], x["heads"]),
    ),
    "lightning": Pair(
        fixed_decay(LIGHTNING), ScalarDecay(LIGHTNING.float(), chunk=16), lambda x: (SCALE * x["q"], x["k"], x["v"], None)
    ),
    "retention": Pair(
        heads_first("retention.naive", "naive_retention", "q", "k", "v", stateful=False),
        ScalarDecay(RETENTION.float(), chunk=16),
        lambda x: (SCALE * x["q"], x["k"], x["v"], None),
    ),
    "GLA": Pair(GLA, DiagonalDecay(chunk=16), lambda x: (SCALE * x["q"], x["k"], x["v"], x["channels"])),
    "HGRN2": Pair(
        lambda x: GLA(forget(x)),
        DiagonalDecay(chunk=16),
        lambda x: (SCALE * x["q"], forget(x)["k"], x["v"], x["channels"]),
    ),
    "RWKV-6": Pair(
        RWKV6, DiagonalDecay(chunk=16, read_before=True), lambda x: (SCALE * x["q"], x["k"], x["v"], x["channels"])
    ),
    "delta rule": Pair(
        lambda x: DELTA(unit(x)),
        DeltaRule(16),
        lambda x: delta_inputs(SCALE * x["q"], unit(x)["k"], x["v"], x["beta"]),
    ),
    "gated delta rule": Pair(
        lambda x: GATED(unit(x)),
        DeltaRule(16),
        lambda x: delta_inputs(SCALE * x["q"], unit(x)["k"], x["v"], x["beta"], x["heads"]),
    ),
    "Kimi delta": Pair(
        lambda x: KDA(unit(x)),
        DeltaRule(16),
        lambda x: delta_inputs(SCALE * x["q"], unit(x)["k"], x["v"], x["beta"], x["channels"]),
    ),
    "RWKV-7": Pair(dplr, DeltaRule(16), dplr_inputs),
    "Based": Pair(
        heads_first("based.naive", "naive_parallel_based", "q", "k", "v", stateful=False),
        ScalarDecay(chunk=16),
        lambda x: (taylor_features(x["q"]), taylor_features(x["k"]), x["v"], None),
        normalise=True,
    ),
    "ReBased": Pair(
        heads_first("rebased.naive", "naive_parallel_rebased", "q", "k", "v", stateful=False, use_norm=False),
        ScalarDecay(chunk=16),
        lambda x: (square_features(SCALE * x["q"]), square_features(x["k"]), x["v"], None),
    ),
}


def leaves(generator: torch.Generator) -> dict[str, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {
        "q": normal(T, H, K),
        "k": normal(T, H, K),
        "v": normal(T, H, V),
        "beta": torch.rand(T, H, generator=generator),
        "heads": slow_log_decay(T, H, generator, dtype=torch.float32),
        "channels": slow_log_decay(T, H, generator, K, dtype=torch.float32),
        "bonus": normal(H, K),
        "S": normal(H, K, V),
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def ours(pair: Pair, x: dict[str, Tensor], stateful: bool, bonus: bool) -> tuple[Tensor, Tensor | None]:
    inputs = pair.inputs(x)
    if pair.normalise:
        q, k, v, decay = inputs
        inputs = q, k, torch.cat([v, torch.ones_like(v[..., :1])], dim=-1), decay
    segments = Segments(Documents((0, T), 1), [(0, T)])
    out, S = pair.op.run(inputs, segments, x["S"][None] if stateful else None)
    if pair.normalise:
        out = out[..., :-1] / out[..., -1:]
    if bonus:  # RWKV-6 adds its bonus of the current token in the layer
        out = out + (inputs[0] * x["bonus"] * inputs[1]).sum(-1, keepdim=True) * inputs[2]
    return out, S[0] if stateful else None


@pytest.mark.parametrize("name", PAIRS)
def test_the_op_is_theirs(name: str, generator: torch.Generator) -> None:
    pair, x = PAIRS[name], leaves(generator)
    reference, S_reference = pair.theirs(x)
    out, S = ours(pair, x, stateful=S_reference is not None, bonus=name == "RWKV-6")
    assert_close(out, reference, "out")
    dout, dS = torch.randn(out.shape, generator=generator), torch.randn(H, K, V, generator=generator)
    results, cotangents = [(out, reference)], [dout]
    if S is not None and S_reference is not None:
        assert_close(S, S_reference, "final state")
        results.append((S, S_reference))
        cotangents.append(dS)
    found, expected = (
        torch.autograd.grad(side, list(x.values()), cotangents, allow_unused=True) for side in zip(*results)
    )
    used = 0
    for leaf, a, b in zip(x, found, expected):
        assert (a is None) == (b is None), leaf
        if a is not None and b is not None:
            assert_close(a, b, f"gradient of {leaf}")
            used += 1
    assert used >= 3
