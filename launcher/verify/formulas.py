"""What each engine should receive, written down apart from the engines.

Nothing here is taken from an engine's code: exchanges are counted on the chain of parts, attention engines token by token.

Legend: P ranks, g ranks of a node, n numbers of a packed map, m numbers of a state, K blocks of a state; H heads, Hkv key
heads, W the widths of a key and a value together.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

from longhaul.models.ops.attention import Mask
from longhaul.models.ops.chain import Link
from longhaul.models.ops.segments import Documents
from longhaul.parallel.layout import SequenceLayout, even_cut


class Cost(NamedTuple):
    """Messages and numbers received by one rank; `wide` ones are of the accumulation type, where that is another."""

    messages: int = 0
    numbers: int | Fraction = 0
    wide: int | Fraction = 0

    def plus(self, other: Cost) -> Cost:
        return Cost(self.messages + other.messages, self.numbers + other.numbers, self.wide + other.wide)

    def bytes(self, size: int, wide_size: int) -> int:
        return int(self.numbers * size + self.wide * wide_size)


Costs = dict[str, Cost]  # by label, as the ledger has it


class Prefix(NamedTuple):
    """One exchange, seen from one rank.

    Attributes:
        packed, state: n and m; values: width of the value axis.
        want_end: whether every rank wants what leaves the chain; has_initial: whether a state enters it.
        inner: ranks of a node.
    """

    chain: Sequence[Link]
    rank: int
    ranks: int
    parts: int
    packed: int
    state: int
    values: int
    reverse: bool
    want_end: bool
    has_initial: bool
    inner: int


def _travel(case: Prefix) -> list[Link]:
    links = [link for link in case.chain if link.length]
    return links[::-1] if case.reverse else links


def _flows(case: Prefix, j: int, i: int) -> bool:
    """Whether what leaves link j (in travel order) reaches the entry of link i."""
    links = _travel(case)
    goes_on = all((a if case.reverse else b).enters for a, b in zip(links[j:i], links[j + 1 : i + 1]))
    return goes_on and not any(link.cut for link in links[j + 1 : i])


def _crosses(case: Prefix) -> bool:
    return any(_flows(case, k - 1, k) for k in range(1, len(_travel(case))))


def _end(case: Prefix) -> Cost:
    """The end of the chain, from the rank that has it."""
    links = _travel(case)
    told = case.want_end and links and links[-1].owner != case.rank and case.ranks > 1
    return Cost(1, case.state) if told else Cost()


def walk(case: Prefix, blocks: int = 1) -> Cost:
    """One state, in K messages, for each part whose document comes from a part of another rank."""
    links, total = _travel(case), _end(case)
    for k in range(1, len(links)):
        if links[k].owner == case.rank != links[k - 1].owner and _flows(case, k - 1, k):
            total = total.plus(Cost(blocks, case.state))
    return total


def all_gather(case: Prefix) -> Cost:
    """All maps of all other ranks, if any document goes on from one part to the next."""
    needed = case.want_end or _crosses(case)
    return Cost(case.ranks - 1, (case.ranks - 1) * case.parts * case.packed) if needed else Cost()


def log_scan(case: Prefix) -> Cost:
    """One map from 1, 2, 4, .. runs before, as long as that run's state gets here."""
    links, total = _travel(case), _end(case)
    firsts = [k for k, link in enumerate(links) if not k or links[k - 1].owner != link.owner]
    for i, first in enumerate(firsts):
        d = 1
        while links[first].owner == case.rank and d <= i and _flows(case, firsts[i - d + 1] - 1, first):
            if links[firsts[i - d]].owner != case.rank:
                total = total.plus(Cost(1, case.packed))
            d *= 2
    return total


def hierarchical(case: Prefix) -> Cost:
    """Maps gathered inside a node, slices of states walking across nodes, the slices gathered inside a node."""
    if not case.want_end and not _crosses(case):
        return Cost()
    size, links = case.inner, list(case.chain)
    node, local = divmod(case.rank, size)
    nodes = [_merge(number, links[start : start + size]) for number, start in enumerate(range(0, len(links), size))]
    rows = case.state // case.values
    width = case.values // size + (local < case.values % size)
    top = case._replace(chain=nodes, rank=node, ranks=case.ranks // size, parts=1, state=rows * width)
    total = Cost(size - 1, (size - 1) * case.packed).plus(walk(top))
    order = [link.owner for link in _travel(top)]
    at = order.index(node) if node in order else None
    reads = at is not None and (_flows(top, at - 1, at) if at else case.has_initial and (case.reverse or nodes[node].enters))
    slices = 2 if case.want_end else int(reads)
    padded = rows * math.ceil(case.values / size)
    return total.plus(Cost(size - 1, slices * (size - 1) * padded) if slices else Cost())


def _merge(number: int, links: Sequence[Link]) -> Link:
    full = [link for link in links if link.length]
    length = sum(link.length for link in full)
    return Link(number, 0, length, length, any(link.cut for link in full), not full or full[0].enters)


# By name; `all_scan` is measured with two blocks.
PREFIXES: dict[str, Callable[[Prefix], Cost]] = {
    "all_gather": all_gather,
    "ring": walk,
    "ring_blocking": walk,
    "all_scan": lambda case: walk(case, blocks=2),
    "log_scan": log_scan,
    "hierarchical": hierarchical,
}


class Attention(NamedTuple):
    """One attention, seen from one rank, without states.

    Attributes:
        widths: of a key and of a value.
        inner: ranks of a group of heads, for `usp`.
        wide: bytes of a number of the accumulation type over those of an input.
    """

    layout: SequenceLayout
    documents: Documents
    mask: Mask
    heads: int
    key_heads: int
    widths: tuple[int, int]
    rank: int
    inner: int
    wide: int = 1

    def tokens(self) -> list[int]:
        """Of every rank."""
        return [self.layout.tokens_of(rank) for rank in range(self.layout.num_ranks)]

    def needs(self, members: Sequence[Sequence[int]]) -> set[tuple[int, int]]:
        """(queries' holder, keys' holder) of which some query sees some key; each holder is some ranks together."""
        runs = sorted((*run, holder) for holder, ranks in enumerate(members) for rank in ranks for run in self.layout.parts[rank])
        bounds, found, first = self.documents.bounds, set(), 0
        for start, stop in zip(bounds, bounds[1:]):
            while first < len(runs) and runs[first][1] <= start:
                first += 1
            inside = []
            for a, b, holder in itertools.islice(runs, first, None):
                if a >= stop:
                    break
                if max(a, start) < min(b, stop):
                    inside.append((max(a, start), min(b, stop), holder))
            for (q, q_end, query), (k, k_end, key) in itertools.product(inside, repeat=2):
                # Distances from key to query, of which one must be seen: from q - (k_end - 1) to q_end - 1 - k.
                nearest = max(q - (k_end - 1), 0) if self.mask.causal else q - (k_end - 1)
                farthest = q_end - 1 - k
                if nearest <= farthest and (self.mask.window is None or nearest < self.mask.window):
                    found.add((query, key))
        return found


def attend_all_gather(case: Attention) -> Costs:
    """Keys and values, padded to the most tokens of a rank: once forward, again and their gradients backward."""
    ranks = case.layout.num_ranks
    alone = [[rank] for rank in range(ranks)]
    if not any(q != k for q, k in case._replace(mask=Mask(causal=False)).needs(alone)):
        return {}
    size = (ranks - 1) * max(case.tokens()) * case.key_heads * sum(case.widths)
    return {"kv forward": Cost(ranks - 1, size), "kv backward": Cost(2 * (ranks - 1), size, size)}


def attend_ring(case: Attention) -> Costs:
    """Blocks go round as far as somebody reads them; their gradients follow and come home. The cheaper of two backwards."""
    ranks = case.layout.num_ranks
    return _ring(case, [[rank] for rank in range(ranks)], case.rank, case.tokens(), case.heads, case.key_heads)


def _ring(case: Attention, members: list[list[int]], me: int, tokens: list[int], heads: int, key_heads: int) -> Costs:
    size, both, own_width = len(members), sum(case.widths), case.widths[0]
    found = case.needs(members) | {(rank, rank) for rank in range(size)}
    key_reach = [max((q - rank) % size for q, k in found if k == rank) for rank in range(size)]
    query_reach = [max((rank - k) % size for q, k in found if q == rank) for rank in range(size)]
    keys = Cost(*_visits(me, tokens, key_reach, 1, 1))
    forward = Cost(keys.messages, keys.numbers * key_heads * both)

    def total(reach: list[int], per_token: int) -> int:
        return sum(a * b for a, b in zip(reach, tokens)) * per_token

    by_query = heads * (both + (2 + own_width) * case.wide)
    if total(query_reach, by_query) < total(key_reach, key_heads * both * (1 + case.wide)):
        block, extra, home, step, reach, label = heads * both, heads * 2, heads * own_width, -1, query_reach, "q backward"
    else:
        block, extra, home, step, reach, label = key_heads * both, 0, key_heads * both, 1, key_reach, "kv backward"
    visit = Cost(*_visits(me, tokens, reach, 1, step))
    later = Cost(*_visits(me, tokens, reach, 2, step))
    home_messages = int(bool(reach[me] and tokens[me]))
    returned = tokens[me] if reach[me] else 0
    messages = (2 if extra else 1) * visit.messages + later.messages + home_messages
    wide = visit.numbers * extra + (later.numbers + returned) * home
    return {"kv forward": forward, label: Cost(messages, visit.numbers * block, wide)}


def _visits(me: int, tokens: list[int], reach: list[int], first: int, step: int) -> tuple[int, int]:
    """(messages, tokens) of others' blocks that come here, at hop `first` or later."""
    size = len(tokens)
    coming = [s for s in range(size) if s != me and first <= (step * (me - s)) % size <= reach[s] and tokens[s]]
    return len(coming), sum(tokens[s] for s in coming)


def attend_rsa(case: Attention) -> Costs:
    """K round and V round, both again in the backward, and two all-reduces of gradients of full length."""
    tokens, ranks = case.tokens(), case.layout.num_ranks
    others = [count for rank, count in enumerate(tokens) if rank != case.rank and count]
    once = Cost(2 * len(others), sum(others) * case.key_heads * sum(case.widths))
    full = [_all_reduce(ranks, sum(tokens) * case.key_heads * width) for width in case.widths]
    sums = Cost(sum(cost.messages for cost in full), 0, sum(cost.numbers for cost in full))
    return {"kv forward": once, "kv backward": once.plus(sums)}


def attend_ulysses(case: Attention) -> Costs:
    """All-to-alls: queries, keys and values to heads, outputs back; cotangents to heads, gradients back."""
    return _heads(case, list(range(case.layout.num_ranks)))


def _heads(case: Attention, group: list[int]) -> Costs:
    """The all-to-alls inside a group of ranks."""
    size, me = len(group), group.index(case.rank)
    group_of = case.heads // case.key_heads
    spans = even_cut(0, case.heads, size)
    h = [b - a for a, b in spans]
    g = [-(-b // group_of) - a // group_of if b > a else 0 for a, b in spans]
    counts = [case.tokens()[rank] for rank in group]
    K, V = case.widths
    found = {}
    for label, backward in (("heads forward", False), ("heads backward", True)):
        numbers = messages = 0
        for other in range(size):
            if other == me:
                continue
            if backward:  # cotangents to heads, gradients of q, k, v back
                blocks = counts[other] * h[me] * V, counts[me] * (h[other] * K + g[other] * (K + V))
            else:  # q, k, v to heads, outputs back
                blocks = counts[other] * (h[me] * K + g[me] * (K + V)), counts[me] * h[other] * V
            numbers += sum(blocks)
            messages += sum(block > 0 for block in blocks)
        found[label] = Cost(messages, numbers)
    return found


def attend_usp(case: Attention) -> Costs:
    """All-to-alls inside groups of consecutive ranks, a ring of groups with this member's heads."""
    size, ranks = case.inner, case.layout.num_ranks
    groups = [list(range(first, first + size)) for first in range(0, ranks, size)]
    number, member = divmod(case.rank, size)
    total = _heads(case, groups[number])
    first, last = even_cut(0, case.heads, size)[member]
    if first == last:
        return total
    ratio = case.heads // case.key_heads
    heads, keys = last - first, -(-last // ratio) - first // ratio
    tokens = [sum(case.tokens()[rank] for rank in group) for group in groups]
    return total | _ring(case, groups, number, tokens, heads, keys)


ATTENTIONS: dict[str, Callable[[Attention], Costs]] = {
    "all_gather": attend_all_gather,
    "ring": attend_ring,
    "rsa": attend_rsa,
    "ulysses": attend_ulysses,
    "usp": attend_usp,
}


def halo(ranks: int, parts: int, width: int, per_token: int, state_gradient: bool = False) -> Costs:
    """The last tokens of every part to every rank, and the gradients of all back to their part."""
    once = Cost(ranks - 1, (ranks - 1) * parts * width * per_token)
    found = {"halo forward": once, "halo backward": once}
    return found | ({"halo state backward": _all_reduce(ranks, width * per_token)} if state_gradient else {})


def prefix(ranks: int, parts: int, numbers: Sequence[int], state_gradient: bool = False) -> Costs:
    """Every part's element, of tensors of so many numbers, to every rank; the gradients back to their part, a state's summed."""
    once = Cost(ranks - 1, (ranks - 1) * parts * sum(numbers))
    found = {"prefix forward": once, "prefix backward": once}
    sums = [_all_reduce(ranks, count) for count in numbers] if state_gradient else []
    return found | ({"prefix state backward": functools.reduce(Cost.plus, sums)} if sums else {})


def total(ranks: int, numbers: int) -> Costs:
    """A sum over ranks, and that of its cotangents."""
    return {"total forward": _all_reduce(ranks, numbers), "total backward": _all_reduce(ranks, numbers)}


def document_sum(ranks: int, layout: SequenceLayout, documents: Documents, numbers: int) -> Costs:
    """The sums of the documents that more than one rank holds, each way."""
    crossing = 0
    for start, stop in zip(documents.bounds, documents.bounds[1:]):
        holders = {rank for rank, own in enumerate(layout.parts) for a, b in own if max(a, start) < min(b, stop)}
        crossing += len(holders) > 1
    if not crossing:
        return {}
    once = _all_reduce(ranks, crossing * numbers)
    return {"document sum forward": once, "document sum backward": once}


def _all_reduce(ranks: int, numbers: int) -> Cost:
    """Counted as the ring that does it: a reduce-scatter and an all-gather, to the last whole byte of float32."""
    return Cost(2 * (ranks - 1), Fraction(2 * (ranks - 1) * numbers * 4 // ranks, 4))
