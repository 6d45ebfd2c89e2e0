"""The largest size whose peak stays within a budget, found in a few measurements. Pure: the measurement is an argument."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

GUESSES = 6  # measurements after which a search that found nothing too large only doubles


class Found(NamedTuple):
    """`size` fits and `size + 1` does not, both measured (`size` 0: not even one does)."""

    size: int
    peaks: dict[int, int]  # size -> bytes, of all sizes that were measured


def largest(peak: Callable[[int], int], budget: int, start: int) -> Found:
    """Search from 1 and `start`, best near the answer. `peak` must not fall while the size grows.

    Bisection between the largest size that fits and the smallest that does not; where the peaks measured so far say where
    the budget is met, that size is tried instead of the middle.
    """
    assert start >= 1 and budget > 0
    peaks: dict[int, int] = {}
    low, high = 0, 0  # high 0: none is too large yet
    size, widths = 1, [0]
    while not high or high - low > 1:
        peaks[size] = peak(size)
        if peaks[size] <= budget:
            low = size
        else:
            high = size
        widths.append(high - low if high else 0)
        if len(peaks) == 1 and start > 1:
            size = start if low else 0
        elif not high:
            guess = _guess(peaks, budget) + 1
            size = min(guess, 4 * low) if guess > low and len(peaks) < GUESSES else 2 * low
        elif widths[-2] and widths[-1] > widths[-2] // 2:
            size = (low + high) // 2
        else:
            size = min(max(_guess(peaks, budget), low + 1), high - 1)
    return Found(low, peaks)


def _guess(peaks: Mapping[int, int], budget: int) -> int:
    """Where a curve through the (up to three) sizes measured nearest to the budget meets it."""
    by_peak = {bytes_: size for size, bytes_ in peaks.items()}
    nearest = {bytes_: by_peak[bytes_] for bytes_ in sorted(by_peak, key=lambda own: abs(own - budget))[:3]}
    if len(nearest) == 1:
        ((bytes_, size),) = nearest.items()
        return 2 * size if bytes_ <= budget else size // 2
    # The size as a function of its peak, by Lagrange's formula.
    total = 0.0
    for own, size in nearest.items():
        weight = float(np.prod([(budget - other) / (own - other) for other in nearest if other != own]))
        total += weight * size
    return int(total)
