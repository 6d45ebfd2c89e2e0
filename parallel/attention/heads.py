"""Tokens to heads and back: the all-to-all of Ulysses, for any number of heads.

Query heads are spread evenly over the members, whether they divide or not; a member may have none. A member gets the key
heads that its query heads read, so a key head whose readers are spread goes to each of them.

Legend: T tokens held here, L tokens held by all members, h heads of this member, P members.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longhaul.parallel.comm import Comm
from longhaul.parallel.layout import even_cut

from .pieces import Held

QUERY, KEY = 0, 1  # which of a member's heads a tensor is cut by


class HeadSplit:
    """Which heads each member has, [(first, last + 1)] a member.

    Attributes:
        ranges: of query heads, and of key heads.
    """

    def __init__(self, heads: int, key_heads: int, members: int) -> None:
        group = heads // key_heads
        queries = even_cut(0, heads, members)
        keys = [(a // group, -(-b // group)) if a < b else (0, 0) for a, b in queries]
        self.ranges = (queries, keys)
        self.totals = (heads, key_heads)
        self.group = group

    def readers(self, member: int) -> list[int]:
        """For each query head of a member, which of the member's key heads it reads."""
        (a, b), (first, _) = self.ranges[QUERY][member], self.ranges[KEY][member]
        return [head // self.group - first for head in range(a, b)]


class HeadExchange:
    """The all-to-all between "my tokens, all heads" and "all members' tokens in stream order, my heads".

    Args:
        comm: the members.
        held: what they hold together; its sources number the members.
    """

    def __init__(self, comm: Comm, held: Held, split: HeadSplit) -> None:
        self.comm, self.held, self.split = comm, held, split
        self.rows: list[list[tuple[int, int]]] = [[] for _ in range(comm.size)]  # of each member, among the L
        token = 0
        ends = []
        for member, start, stop in held.sources:
            self.rows[member].append((token, token + stop - start))
            ends.append((member, start, stop))
            token += stop - start
        self.counts = [sum(b - a for a, b in rows) for rows in self.rows]

    def _widths(self, member: int, kinds: Sequence[int], tensors: Sequence[Tensor]) -> list[int]:
        spans = [self.split.ranges[kind][member] for kind in kinds]
        return [(b - a) * tensor.shape[2] for (a, b), tensor in zip(spans, tensors)]

    def to_heads(self, tensors: Sequence[Tensor], kinds: Sequence[int], label: str) -> list[Tensor]:
        """[T, all heads, W] each -> [L, h, W] each, in one message to every member."""
        blocks = []
        for member in range(self.comm.size):
            spans = [self.split.ranges[kind][member] for kind in kinds]
            blocks.append(torch.cat([tensor[:, a:b].flatten(1) for (a, b), tensor in zip(spans, tensors)], dim=1))
        widths = self._widths(self.comm.rank, kinds, tensors)
        shapes = [(count, sum(widths)) for count in self.counts]
        received = self.comm.all_to_all(blocks, shapes, label).wait()
        whole = torch.cat([received[member][start:stop] for member, start, stop in self.held.sources])
        parts = whole.split(widths, dim=1)
        return [part.unflatten(1, (-1, t.shape[2])) if part.shape[1] else t.new_empty(part.shape[0], 0, t.shape[2])
                for part, t in zip(parts, tensors)]

    def to_tokens(self, tensors: Sequence[Tensor], kinds: Sequence[int], label: str) -> list[Tensor]:
        """[L, h, W] each -> [T, all heads, W] each; shares of a key head that several members have are summed."""
        flat = torch.cat([tensor.flatten(1) for tensor in tensors], dim=1)
        blocks = [torch.cat([flat[:0], *(flat[a:b] for a, b in rows)]) for rows in self.rows]
        count = self.counts[self.comm.rank]
        widths = [self._widths(member, kinds, tensors) for member in range(self.comm.size)]
        received = self.comm.all_to_all(blocks, [(count, sum(own)) for own in widths], label).wait()
        results = [t.new_zeros(count, self.split.totals[kind], t.shape[2]) for t, kind in zip(tensors, kinds)]
        for member, block in enumerate(received):
            for result, kind, part in zip(results, kinds, block.split(widths[member], dim=1)):
                a, b = self.split.ranges[kind][member]
                if a < b:
                    result[:, a:b] += part.unflatten(1, (b - a, -1))
        return results
