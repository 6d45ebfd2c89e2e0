"""HiPPO-LegS as a diagonal, and its zero-order hold.

HiPPO-LegS (Gu et al., arXiv 2008.07669) is `A_nk = -sqrt((2n+1)(2k+1))` for n > k, `-(n+1)` for n = k, else 0, with
`B_n = sqrt(2n+1)`. Its normal part `A + P P^T`, `P_n = sqrt(n + 1/2)`, is `-1/2` plus a skew-symmetric matrix
(HiPPO-N), so it has orthonormal eigenvectors V and eigenvalues `-1/2 + i w`, in conjugate pairs. Dropping the rank-one part is
what S4D-LegS and S5 start from; of each pair one is held.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TERMS = 19  # 1 / 20! is below the rounding of float64


def hippo_normal(size: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues with positive imaginary part of HiPPO-N of an even size N, ascending.

    Returns:
        Imaginary parts w, float64 [N / 2] (all real parts are -1/2), and eigenvectors, complex128 [N, N / 2].
    """
    root = (2 * torch.arange(size, dtype=torch.float64, device="cpu") + 1).sqrt()
    half = root[:, None] * root / 2
    skew = half.triu(1) - half.tril(-1)
    values, vectors = torch.linalg.eigh(-1j * skew)  # skew = V (i w) V^*
    return values[size // 2 :], vectors[:, size // 2 :]


def zero_order_hold(log_decay: Tensor, dt: Tensor) -> Tensor:
    """`(exp(dt A) - 1) / A` for `log_decay` = dt A, dt real: what an input held for one step adds. Complex, any shape.

    It is dt phi(dt A), `phi(z) = (exp(z) - 1) / z = sum_n z^n / (n+1)!`. As a quotient by A its gradient would be a difference of
    two terms of order dt / A whose value is dt^2 / 2: slow states would lose all digits of it.
    """
    small = log_decay.abs() < 1
    z = torch.where(small, log_decay, 0)
    series = torch.zeros_like(z)
    for n in reversed(range(_TERMS)):
        series = series * z + 1 / math.factorial(n + 1)
    z = torch.where(small, 1, log_decay)
    return dt * torch.where(small, series, (z.exp() - 1) / z)
