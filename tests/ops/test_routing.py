"""Routed recurrences: buckets against identity steps of all memories, and what leaves a bucket."""

import pytest
import torch

from longhaul.models.ops.affine import Dense
from longhaul.models.ops.delta_rule import DeltaRule
from longhaul.models.ops.delta_rule.naive import delta_rule
from longhaul.models.ops.recurrence import EachPart, Recurrence, scan
from longhaul.models.ops.routing import Buckets, Routed, Tail, TailMonoid, choose, tails
from longhaul.models.ops.routing.naive import gather, spread
from longhaul.models.ops.scalar_decay import ScalarDecay
from longhaul.models.ops.scalar_decay.naive import scalar_decay
from longhaul.models.ops.segments import Documents, Segments
from tests.harness.cases import slow_log_decay
from tests.harness.numerics import assert_bitwise_equal, assert_close

MEMORIES, HEADS, WIDTH_K, WIDTH_V, CHUNK = 4, 2, 3, 5, 8
STREAMS = {
    "one": ((0, 41), 0, [(0, 41)]),
    "continued": ((0, 41), 5, [(0, 41)]),
    "documents": ((0, 3, 5, 30, 31, 41), 2, [(0, 41)]),
    "parts, one empty": ((0, 3, 5, 30, 31, 41), 2, [(0, 17), (17, 17), (29, 41)]),
    "nothing": ((0,), 0, [(0, 0)]),
}
RULES = ("delta", "gated delta", "scalar decay", "linear")


class Case:
    """Memory 3 is never chosen, and memory 2 not by the last tokens, so that documents start which it never sees."""

    def __init__(self, stream: str, rule: str, generator: torch.Generator) -> None:
        bounds, first, parts = STREAMS[stream]
        self.segments = Segments(Documents(bounds, first), parts)
        tokens, num_parts = self.segments.num_tokens, self.segments.num_parts
        scores = torch.rand(tokens, MEMORIES, generator=generator)
        scores[:, 3] = -1
        scores[tokens // 3 :, 2] = -1
        self.buckets = Buckets(scores.topk(2).indices, MEMORIES, self.segments)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        rows = 2 * tokens
        self.q, self.k, self.v = normal(rows, HEADS, WIDTH_K), normal(rows, HEADS, WIDTH_K), normal(rows, HEADS, WIDTH_V)
        self.b = -self.k * torch.rand(rows, HEADS, 1, generator=generator) / WIDTH_K if "delta" in rule else None
        self.decay = slow_log_decay(rows, HEADS, generator) if rule in ("gated delta", "scalar decay") else None
        self.S_in = normal(num_parts, MEMORIES * HEADS, WIDTH_K, WIDTH_V)
        self.cotangents = normal(rows, HEADS, WIDTH_V), normal(*self.S_in.shape)
        self.leaves = [x for x in (self.q, self.k, self.v, self.b, self.decay, self.S_in) if x is not None]
        for leaf in self.leaves:
            leaf.requires_grad_()

    @property
    def x(self) -> tuple[torch.Tensor | None, ...]:
        if self.b is None:
            return self.q, self.k, self.v, self.decay
        return self.q, self.k, self.v, self.b, None, self.decay

    @property
    def op(self) -> Routed:
        return Routed(ScalarDecay(chunk=CHUNK) if self.b is None else DeltaRule(CHUNK), self.buckets)

    def oracle(self) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (spread(rows, self.buckets) for rows in (self.q, self.k, self.v))
        decay = None if self.decay is None else spread(self.decay, self.buckets)
        if self.b is None:
            out, S_out = scalar_decay(q, k, v, decay, self.segments, self.S_in)
        else:
            out, S_out = delta_rule(q, k, v, spread(self.b, self.buckets), None, decay, self.segments, self.S_in)
        return gather(out, self.buckets), S_out

    def gradients(self, results: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(results, self.leaves, self.cotangents, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stream", STREAMS)
def test_buckets_equal_identity_steps(stream: str, rule: str, generator: torch.Generator) -> None:
    case = Case(stream, rule, generator)
    found, expected = case.op.run(case.x, case.segments, case.S_in), case.oracle()
    for name, a, b in zip(("out", "S_out"), found, expected):
        assert_close(a, b, name)
    for name, a, b in zip(("dq", "dk", "dv", "fourth", "fifth", "sixth"), case.gradients(found), case.gradients(expected)):
        assert_close(a, b, f"gradient, {name}")


class ByAutograd(Recurrence):
    """A rule that writes `run` and nothing else."""

    def state_shape(self, x):
        return HEADS, WIDTH_K, WIDTH_V

    def run(self, x, segments, S_in=None):
        q, k, v, b, e, decay = x
        return delta_rule(q, k, v, b, e, decay, segments, S_in)

    def linear_from_vjp(self, vjp, offset):
        return Dense.from_vjp(vjp, offset)


def test_any_rule_serves(generator: torch.Generator) -> None:
    case = Case("documents", "gated delta", generator)
    found = scan(Routed(ByAutograd(), case.buckets), case.x, case.segments, EachPart(case.segments), case.S_in, want_end=True)
    for name, a, b in zip(("out", "S_out"), found, case.oracle()):
        assert_close(a, b, name)


def test_a_memory_without_tokens_passes_its_state_on_bit_by_bit(generator: torch.Generator) -> None:
    case = Case("continued", "gated delta", generator)
    assert case.buckets.sizes[3] == 0
    _, S_out = case.op.run(case.x, case.segments, case.S_in)
    assert_bitwise_equal(S_out[:, 3 * HEADS :], case.S_in[:, 3 * HEADS :], "the state nobody touched")


def test_nothing_leaves_a_memory_that_the_last_document_did_not_choose(generator: torch.Generator) -> None:
    case = Case("documents", "gated delta", generator)
    assert case.buckets.lost is not None and case.buckets.sizes[2] > 0 and case.buckets.lost[0].tolist()[2:] == [True, True]
    _, S_out = case.op.run(case.x, case.segments, case.S_in)
    assert S_out[:, 2 * HEADS :].eq(0).all() and S_out[:, : 2 * HEADS].abs().min() > 0


@pytest.mark.parametrize("rule", RULES)
def test_one_token_steps_equal_the_run(rule: str, generator: torch.Generator) -> None:
    case = Case("one", rule, generator)
    out, S_out = case.op.run(case.x, case.segments)
    S, tokens = torch.zeros_like(S_out[0]), case.segments.num_tokens
    for t in range(tokens):
        rows = (case.buckets.tokens == t).nonzero().squeeze(1)
        one = Segments(Documents((0, 1), t), [(0, 1)])
        buckets = Buckets(case.buckets.memories[rows][None], MEMORIES, one)
        step, S = Routed(case.op.rule, buckets).step(tuple(None if x is None else x[rows] for x in case.x), S)
        assert_close(step, out[rows], f"token {t}")
    assert_close(S, S_out[0], "state")


def test_buckets_keep_the_order_of_time(generator: torch.Generator) -> None:
    segments = Segments(Documents((0, 300)), [(0, 120), (120, 300)])
    chosen = torch.rand(300, 4, generator=generator).topk(2).indices
    buckets = Buckets(chosen, 4, segments)
    start = 0
    for bucket, size in enumerate(buckets.sizes):
        part, memory = divmod(bucket, 4)
        expected = [t for t in range(*((0, 120), (120, 300))[part]) if memory in chosen[t].tolist()]
        assert buckets.tokens[start : start + size].tolist() == expected
        start += size
    assert start == 600


def test_ties_go_to_the_first() -> None:
    probabilities = torch.full((2, 400), 0.1)  # so many that a sort that is not stable shows
    probabilities[1, 0] = 0.05
    scores, chosen = choose(probabilities, 2)
    assert chosen.tolist() == [[0, 1], [1, 2]]
    assert_close(scores, torch.full((2, 2), 0.5), "scores")


def test_a_constant_decay_is_refused(generator: torch.Generator) -> None:
    case = Case("one", "linear", generator)
    op = Routed(ScalarDecay(slow_log_decay(1, HEADS, generator)[0], CHUNK), case.buckets)
    with pytest.raises(ValueError, match="decays as inputs"):
        op.summarize(tuple(None if x is None else x.detach() for x in case.x), case.segments)


def test_tails_merge_associatively(generator: torch.Generator) -> None:
    width, monoid = 3, TailMonoid()

    def tail(counts: list[int]) -> Tail:
        rows = torch.randn(len(counts), width, 2, generator=generator, dtype=torch.float64)
        for memory, count in enumerate(counts):
            rows[memory, : width - count] = 0
        return Tail(rows, torch.tensor(counts))

    a, b, c = tail([3, 0, 2, 1]), tail([1, 2, 0, 3]), tail([0, 2, 1, 1])
    left, right = monoid.combine(monoid.combine(a, b), c), monoid.combine(a, monoid.combine(b, c))
    for name, x, y in zip(Tail._fields, left, right):
        assert_bitwise_equal(x, y, name)
    for pair in (monoid.combine(a, monoid.empty(a)), monoid.combine(monoid.empty(a), a)):
        assert_bitwise_equal(pair.rows, a.rows, "merged with nothing")
    assert_bitwise_equal(left.rows[1], torch.cat([b.rows[1, 2:], c.rows[1, 1:]]), "the last rows of b, then c")


def test_tails_are_the_last_rows_of_the_last_document() -> None:
    segments = Segments(Documents((0, 4, 11)), [(0, 2), (2, 11), (11, 11)])
    chosen = torch.tensor([[0], [1], [0], [1], [0], [1], [0], [0], [0], [0], [0]])
    buckets = Buckets(chosen, 3, segments)
    rows = (buckets.tokens + 1.0)[:, None]
    found = tails(rows, buckets, 3)
    assert found.counts.tolist() == [[1, 1, 0], [3, 1, 0], [0, 0, 0]]
    expected = [[[0, 0, 1], [0, 0, 2], [0, 0, 0]], [[9, 10, 11], [0, 0, 6], [0, 0, 0]], [[0, 0, 0]] * 3]
    assert found.rows.squeeze(-1).tolist() == expected
