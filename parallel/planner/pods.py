"""Large clusters: divide the ranks into pods, deal the documents out, and let every pod plan itself.

Valid where no barrier joins the pods within a step (HSDP: sharded inside a pod, replicated across); the step takes as
long as its slowest pod.
"""

from __future__ import annotations

import heapq

from longhaul.parallel.planner.problem import Problem

LARGEST = 128  # ranks planned as one cluster
POD = 64  # ranks of a pod


def pod_blocks(ranks: int, size: int) -> list[range]:
    """Consecutive pods of `size` ranks; the last may be smaller."""
    return [range(first, min(first + size, ranks)) for first in range(0, ranks, size)]


def pod_size(problem: Problem) -> int:
    """Smallest power of two, at least `POD`, whose every pod's largest group holds the longest document."""
    size = POD
    while size < problem.cluster.ranks:
        blocks = pod_blocks(problem.cluster.ranks, size)
        smallest = min(_capacity(problem, block) for block in blocks)
        if smallest >= problem.length[0]:
            return size
        size *= 2
    return problem.cluster.ranks


def _capacity(problem: Problem, block: range) -> int:
    """Longest document a group inside the pod holds."""
    return max(
        capacity
        for kind, capacity in zip(problem.kinds, problem.capacity, strict=True)
        if any(first in block and first + kind.degree <= block.stop for first in kind.firsts)
    )


def deal(problem: Problem, blocks: list[range]) -> list[list[int]]:
    """Documents (positions) of each pod: longest first to the least loaded pod, where a load is least time plus a share
    of the biases.
    """
    speeds = [sum(problem.cluster.speed(rank) for rank in block) for block in blocks]
    rooms = [len(block) * problem.tokens for block in blocks]
    heap = [(0.0, pod) for pod in range(len(blocks))]
    hands: list[list[int]] = [[] for _ in blocks]
    for i, tokens in enumerate(problem.length):
        load, pod = heapq.heappop(heap)
        hands[pod].append(i)
        load += problem.area[i] / speeds[pod] + problem.bias * tokens / rooms[pod]
        heapq.heappush(heap, (load, pod))
    return hands
