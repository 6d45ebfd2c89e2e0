"""The awkward inputs of all tests, in one place.

Letters: `T` tokens, `H` heads, `K` key width, `P` ranks.
"""

import itertools

import torch


def slow_log_decay(
    num_tokens: int,
    heads: int,
    generator: torch.Generator,
    key_width: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Log decays of gates that remember: time constants of 10 to 100 lengths, another one at every entry.

    A gate that forgets within a rank hides what a rank hands over.

    Returns:
        [T, H], or [T, H, K] with a key width; all < 0.
    """
    shape = (num_tokens, heads) if key_width is None else (num_tokens, heads, key_width)
    exponent = torch.rand(shape, generator=generator, dtype=torch.float64)
    time_constant = 10.0 * max(num_tokens, 1) * 10.0**exponent
    return (-1.0 / time_constant).to(dtype)


def _bounds(num_tokens: int, starts: list[int]) -> tuple[int, ...]:
    """Bounds of documents that start at token 0 and at those of `starts` that lie inside the stream."""
    return (0, *sorted({start for start in starts if 0 < start < num_tokens}), num_tokens)


def document_tables(num_tokens: int) -> dict[str, tuple[int, ...]]:
    """Bounds of documents that fill a stream, by what is awkward about them.

    one: a single document.
    many_short: 1 to 3 tokens each, shorter than a convolution of width 4.
    edge: a document starts at every edge of the even layout on 2, 3 and 4 ranks.
    spanning: one document covers a whole rank and goes on at both sides, on 3 and 4 ranks.
    mixed: short ones, a long one, a single token at the end.
    """
    if num_tokens < 1:
        raise ValueError(f"a stream of documents needs a token, got {num_tokens}; an empty rank is in rank_lengths")
    short = [2, 1, 3, 1, 1, 2, 3, 3]
    edges = [edge for ranks in (2, 3, 4) for edge in itertools.accumulate(rank_lengths(num_tokens, ranks)["even"])]
    return {
        "one": (0, num_tokens),
        "many_short": _bounds(num_tokens, list(itertools.accumulate(short * num_tokens))),
        "edge": _bounds(num_tokens, edges),
        "spanning": _bounds(num_tokens, [num_tokens // 8, num_tokens - num_tokens // 8]),
        "mixed": _bounds(num_tokens, [1, 3, 6, num_tokens // 5, 4 * num_tokens // 5, num_tokens - 3, num_tokens - 1]),
    }


def rank_lengths(num_tokens: int, world_size: int) -> dict[str, tuple[int, ...]]:
    """Lengths of the ranks' contiguous shares, by what is awkward about them; each sums to `num_tokens`.

    even: lengths differ by one at most, the longer ones first.
    uneven: all different sizes, one rank has a single token.
    empty_first, empty_middle, empty_last: one rank has nothing (from two ranks on; middle from three).
    """
    everyone = range(world_size)
    tables = {"even": _share(num_tokens, [1] * world_size)}
    if world_size > 1:
        small = world_size // 2
        rest = _share(max(num_tokens - 1, 0), [0 if rank == small else 3 + rank * 2 for rank in everyone])
        single = min(num_tokens, 1)
        tables["uneven"] = tuple(single if rank == small else rest[rank] for rank in everyone)
        empty = {"empty_first": 0, "empty_middle": world_size // 2, "empty_last": world_size - 1}
        for name, nobody in empty.items():
            if name != "empty_middle" or world_size > 2:
                tables[name] = _share(num_tokens, [0 if rank == nobody else 1 for rank in everyone])
    return tables


def _share(num_tokens: int, weights: list[int]) -> tuple[int, ...]:
    """Split a length by integer weights; what is left over goes to the first ranks that have a weight."""
    lengths = [num_tokens * weight // sum(weights) for weight in weights]
    takers = [rank for rank, weight in enumerate(weights) if weight]
    for rank in takers[: num_tokens - sum(lengths)]:
        lengths[rank] += 1
    return tuple(lengths)
