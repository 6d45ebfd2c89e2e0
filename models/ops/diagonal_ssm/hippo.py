"""HiPPO-LegS as a diagonal, and its zero-order hold.

HiPPO-LegS (Gu et al., arXiv 2008.07669) is `A_nk = -sqrt((2n+1)(2k+1))` for n > k, `-(n+1)` for n = k, else 0, with
`B_n = sqrt(2n+1)`. Its normal part `A + P P^T`, `P_n = sqrt(n + 1/2)`, is `-1/2` plus a skew-symmetric matrix
(HiPPO-N), so it has orthonormal eigenvectors V and eigenvalues `-1/2 + i w`, in conjugate pairs. Dropping the rank-one part is
what S4D-LegS and S5 start from; of each pair one is held.
"""

from __future__ import annotations

import torch
from torch import Tensor


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


def zero_order_hold(log_decay: Tensor, A: Tensor) -> Tensor:
    """`(exp(dt A) - 1) / A` for `log_decay` = dt A: what an input held for one step of size dt adds. Complex, any shape."""
    a, b = log_decay.real, log_decay.imag
    # expm1 of a complex number: near 0, where slow states lie, exp(z) - 1 would cancel.
    real = a.expm1() * b.cos() - 2 * (b / 2).sin().square()
    return torch.complex(real, a.exp() * b.sin()) / A
