"""Linear ridge probes: how much of one vector another one still tells.

A probe is fitted on some documents and judged on others by the mean cosine between what it says and the truth, both measured
from the truth's mean over the fitted documents: a probe that knows nothing scores 0, not the likeness of all vectors to
their mean.

Legend: n pairs, D width of a vector.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Probe:
    """The best linear guess of `y` from `x` under a ridge penalty, from sums over pairs; float64.

    Args:
        width: D, of `x` and of `y`.
        ridge: penalty, as a share of the mean variance of x's entries.
    """

    def __init__(self, width: int, ridge: float = 1e-3) -> None:
        self.ridge, self.count = ridge, 0
        self.sum_x, self.sum_y = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        self.xx = torch.zeros(width, width, dtype=torch.float64)
        self.xy = torch.zeros(width, width, dtype=torch.float64)
        self._weight: Tensor | None = None
        self.cosines, self.judged = 0.0, 0

    def fit(self, x: Tensor, y: Tensor) -> None:
        """Add pairs, [n, D] each."""
        x, y = x.double(), y.double()
        self.count += len(x)
        self.sum_x += x.sum(0)
        self.sum_y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self._weight = None

    def judge(self, x: Tensor, y: Tensor) -> None:
        """Count the cosines of pairs, [n, D] each, that the probe was not fitted on."""
        if not len(x) or not self.count:
            return
        mean_x, mean_y = self.sum_x / self.count, self.sum_y / self.count
        if self._weight is None:
            covariance = self.xx / self.count - torch.outer(mean_x, mean_x)
            penalty = self.ridge * covariance.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
            covariance.diagonal().add_(penalty)
            self._weight = torch.linalg.solve(covariance, self.xy / self.count - torch.outer(mean_x, mean_y))
        guess = (x.double() - mean_x) @ self._weight
        self.cosines += torch.cosine_similarity(guess, y.double() - mean_y, dim=-1).sum().item()
        self.judged += len(x)

    @property
    def fidelity(self) -> float | None:
        """The mean cosine, in [-1, 1]; None if nothing was fitted or judged."""
        return self.cosines / self.judged if self.judged else None
