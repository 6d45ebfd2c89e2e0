"""Keep some documents apart: at most one of them in a group.

A document that began in an earlier stream must come first in its group, where alone a stream's positions may begin above 0
(`Documents.first_position`), so a group has room for one. Candidates are found without this rule and mended afterwards: there
are few such documents, one a stream of the step, and many others to change places with.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from longhaul.parallel.planner.problem import NEVER, Group, Problem, Shelf


@dataclass(frozen=True)
class _Place:
    """Where a document could go.

    Attributes:
        shelf: number of the micro-batch; that after the last one is new.
        group: that it joins; None: a new one of the given kind and block.
        back: document that comes back for it, -1 if none does.
        halves: its group cut in two instead.
    """

    shelf: int
    group: Group | None = None
    back: int = -1
    kind: int = -1
    first: int = -1
    halves: tuple[Group, ...] = ()


def separate(problem: Problem, shelves: list[Shelf], apart: Collection[int]) -> list[Shelf]:
    """Move documents until no group holds two of `apart` (positions); in place, each to where it lengthens the step least.

    A document joins a group that has memory, changes places with another one, has its group cut in two, or gets a group of its
    own, in a new micro-batch if need be, so this always succeeds.
    """
    waiting = [(number, group) for number, shelf in enumerate(shelves) for group in shelf]
    while waiting:
        number, group = waiting.pop()
        own = sorted(i for i in group[3] if i in apart)
        if len(own) < 2:
            continue
        i = own[1]  # the longest stays
        places = _places(problem, shelves, apart, number, group, i)
        place = min(places, key=_longer(problem, shelves, number, group, i))
        if place.halves:
            index = next(index for index, each in enumerate(shelves[number]) if each is group)
            shelves[number][index : index + 1] = place.halves
            waiting += [(number, half) for half in place.halves]
        else:
            _move(problem, shelves, group, i, place)
            waiting.append((number, group))
    return shelves


def _move(problem: Problem, shelves: list[Shelf], source: Group, i: int, place: _Place) -> None:
    target = place.group
    if target is None:
        target = [problem.start[place.kind], 0, place.kind, [], place.first]
        if place.shelf == len(shelves):
            shelves.append([])
        shelves[place.shelf].append(target)
    for document, old, new in ((i, source, target), (place.back, target, source)):
        if document < 0:
            continue
        for group, sign in ((old, -1), (new, 1)):
            group[0] += sign * problem.time[document][group[2]]
            group[1] += sign * problem.length[document]
        old[3].remove(document)
        new[3].append(document)


def _longer(problem: Problem, shelves: list[Shelf], number: int, source: Group, i: int) -> Callable[[_Place], int]:
    """By place: microseconds that the step gains, by the sum over micro-batches of the longest group."""
    tops = [sorted(((group[0], id(group)) for group in shelf), reverse=True)[:3] for shelf in shelves]  # two may be changed

    def of(place: _Place) -> int:
        changed = (id(source), id(place.group))
        if place.halves:
            left, there = (half[0] for half in place.halves)
        else:
            back, kind = place.back, place.kind if place.group is None else place.group[2]
            left = source[0] - problem.time[i][source[2]] + (0 if back < 0 else problem.time[back][source[2]])
            base = problem.start[kind] if place.group is None else place.group[0]
            there = base + problem.time[i][kind] - (0 if back < 0 else problem.time[back][kind])
        change = 0 if place.shelf < len(shelves) else problem.bias + there
        for index in {number, place.shelf} - {len(shelves)}:
            others = next((time for time, group in tops[index] if group not in changed), 0)
            change += max(others, left * (index == number), there * (index == place.shelf)) - tops[index][0][0]
        return change

    return of


def _places(
    problem: Problem, shelves: list[Shelf], apart: Collection[int], number: int, source: Group, i: int
) -> Iterator[_Place]:
    tokens, time = problem.length[i], problem.time[i]
    for index, shelf in enumerate(shelves):
        for group in shelf:
            kind, room = group[2], problem.capacity[group[2]] - group[1]
            if group is source or time[kind] >= NEVER or any(other in apart for other in group[3]):
                continue
            if tokens <= room:
                yield _Place(index, group)
            for back in group[3]:
                fits = source[1] - tokens + problem.length[back] <= problem.capacity[source[2]]
                if fits and tokens - problem.length[back] <= room and problem.time[back][source[2]] < NEVER:
                    yield _Place(index, group, back)
        for kind, first in _free(problem, shelf):
            if time[kind] < NEVER:
                yield _Place(index, kind=kind, first=first)
    halves = _halves(problem, apart, source)
    if halves:
        yield _Place(number, halves=halves)
    for kind, entry in enumerate(problem.kinds):
        if time[kind] < NEVER:
            yield _Place(len(shelves), kind=kind, first=-1 if problem.even else entry.firsts[0])


def _halves(problem: Problem, apart: Collection[int], source: Group) -> tuple[Group, ...]:
    """The group cut in two, documents to the half that is shorter, those to be kept apart one by one to either; () if that
    does not fit.
    """
    degree, first = problem.degree[source[2]] // 2, source[4]
    if not degree:
        return ()
    if problem.even:
        kinds = [problem.degree.index(degree)] * 2
    else:
        starts = (first, first + degree)
        blocks = [[k for k, entry in enumerate(problem.kinds) if entry.degree == degree and at in entry.firsts] for at in starts]
        kinds = [max(options, key=lambda kind: problem.capacity[kind]) for options in blocks]
    second = -1 if first < 0 else first + degree
    halves: list[Group] = [[problem.start[kind], 0, kind, [], at] for kind, at in zip(kinds, (first, second), strict=True)]
    count = [0, 0]
    for i in sorted(source[3]):
        kept_apart = i in apart
        order = sorted((0, 1), key=lambda half: (count[half] if kept_apart else 0, halves[half][0]))
        for half in order:
            group = halves[half]
            if problem.time[i][group[2]] < NEVER and group[1] + problem.length[i] <= problem.capacity[group[2]]:
                group[0] += problem.time[i][group[2]]
                group[1] += problem.length[i]
                group[3].append(i)
                count[half] += kept_apart
                break
        else:
            return ()
    return tuple(halves) if all(count) else ()


def _free(problem: Problem, shelf: Shelf) -> Iterator[tuple[int, int]]:
    """Kinds of block for which a micro-batch has free ranks, and the first rank of one where blocks differ."""
    if problem.even:
        free = problem.cluster.ranks - sum(problem.degree[group[2]] for group in shelf)
        for kind, degree in enumerate(problem.degree):
            if degree <= free:
                yield kind, -1
        return
    busy = {rank for group in shelf for rank in range(group[4], group[4] + problem.degree[group[2]])}
    for kind, entry in enumerate(problem.kinds):
        for first in entry.firsts:
            if not busy & set(range(first, first + entry.degree)):
                yield kind, first
                break
