"""What to change, in words: every sentence rests on the plan or on a plan of the changed step."""

from __future__ import annotations

from collections.abc import Sequence

from longhaul.parallel.planner import Cluster, CostModel, Plan, plan
from longhaul.parallel.planner.problem import Problem

from .compare import Static

IDLE, BIAS, GAP, GAIN = 0.10, 0.30, 0.10, 0.02  # shares from which a sentence is worth reading
FULL = 0.95  # of a rank's memory

# The planner's engine -> the exchange of a run that has its costs.
EXCHANGE = {"all_gather": "all_gather", "scan": "log_scan", "ring": "ring"}


def advise(
    lengths: Sequence[int],
    cluster: Cluster,
    model: CostModel,
    made: Plan,
    static: Static,
    engines: Sequence[tuple[str, CostModel]] = (),
    budget: int = 60_000,
) -> list[str]:
    """Sentences, the heaviest reason first.

    Args:
        engines: other engines of the linear layers, and the cost model with each.
    """
    problem = Problem(lengths, cluster, model)
    found = [_longest(lengths, problem, made), *_waiting(lengths, cluster, model, made, budget)]
    found += [_bias(problem, made), _engine(lengths, cluster, made, model, engines, budget), _static(made, static), _gap(made)]
    said = [sentence for sentence in found if sentence]
    return said or ["Nothing stands out: ranks are busy, and the plan is close to the bound."]


def _longest(lengths: Sequence[int], problem: Problem, made: Plan) -> str | None:
    index = problem.order[0]
    tokens = lengths[index]
    group = next(group for batch in made.micro_batches for group in batch.groups if index in group.documents)
    alone = problem.least[0] * 1e-6
    if tokens > FULL * max(problem.capacity):
        return (
            f"The longest document ({tokens:,} tokens) nearly fills the memory of the largest group ({max(problem.capacity):,} "
            "tokens): more ranks or memory, train.activation_checkpointing full or train.stream_tokens make room for longer "
            "ones."
        )
    if (
        group.degree > 1
        and max(b - a for a, b in zip(group.cuts, group.cuts[1:])) > FULL * problem.tokens
        and (tokens * 2 > group.degree * problem.tokens)
    ):
        return (
            f"The longest document ({tokens:,} tokens) is bound by memory: it takes {group.degree} ranks because a rank holds "
            f"{problem.tokens:,} tokens. More memory a rank, or train.activation_checkpointing full, allows a smaller group."
        )
    if alone > 0.5 * made.time and len(lengths) > 1:
        return (
            f"The longest document ({tokens:,} tokens) alone takes {alone / made.time:.0%} of the step whatever the plan: put "
            "more documents into a step, or cut or stream documents above a length (train.stream_tokens)."
        )
    return None


def _waiting(lengths: Sequence[int], cluster: Cluster, model: CostModel, made: Plan, budget: int) -> list[str]:
    if made.idle < IDLE:
        return []
    more = plan([*lengths, *lengths], cluster, model, budget)
    gain = 2 * made.time / more.time - 1
    sentence = f"Ranks wait {made.idle:.0%} of the step"
    if gain > GAIN:
        return [f"{sentence}: put more documents into a step (twice as many: {more.idle:.0%} idle, {gain:+.0%} tokens a second)."]
    return [f"{sentence}, and more documents a step do not help: the groups that memory or links force are uneven."]


def _bias(problem: Problem, made: Plan) -> str | None:
    share = problem.bias * 1e-6 * len(made.micro_batches) / made.time
    if share < BIAS:
        return None
    count = len(made.micro_batches)
    if count == 1:
        return f"{share:.0%} of the step is the fixed cost of its one micro-batch: put more documents into a step."
    return (
        f"{share:.0%} of the step is the fixed cost of {count} micro-batches: more tokens a rank (train.activation_checkpointing "
        "full, or more memory) would need fewer of them."
    )


def _engine(
    lengths: Sequence[int],
    cluster: Cluster,
    made: Plan,
    model: CostModel,
    engines: Sequence[tuple[str, CostModel]],
    budget: int,
) -> str | None:
    times = {name: plan(lengths, cluster, other, budget).time for name, other in engines}
    if not times:
        return None
    best = min(times, key=lambda name: times[name])
    gain = made.time / times[best] - 1
    now = next(layer.engine for layer in model.layers if layer.kind == "linear")
    if gain < GAIN:
        return None
    return (
        f"Linear layers: {best} of states instead of {now} makes the step {gain:.0%} faster ({times[best]:.4g} s): set "
        f"parallel.exchange {EXCHANGE[best]}."
    )


def _static(made: Plan, static: Static) -> str | None:
    gain = static.seconds[static.best] / made.time - 1
    if gain >= GAIN:
        return None
    return (
        f"A single degree of {static.best} is about as good ({gain:+.1%}): parallel.sequence_parallel_size {static.best} needs "
        "no planner."
    )


def _gap(made: Plan) -> str | None:
    if made.gap < GAP:
        return None
    return f"The plan may be up to {made.gap:.0%} above the best one: --exact computes a tighter bound, --budget searches longer."
