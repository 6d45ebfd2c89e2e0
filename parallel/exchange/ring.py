"""LASP: the running state goes rank to rank, whole.

Sun et al., "Linear Attention Sequence Parallelism" (arXiv 2404.02882), for any affine map. The released code blocks on the
receive before its local kernel, so that P local kernels stand in a row; `Ring` runs the local kernel first, which leaves
P - 1 hops and one small update each on the critical path. `ring_blocking` is the published order, for comparison.
"""

from __future__ import annotations

from .walk import Walk


class Ring(Walk):
    """One message, one state, for each run that reads from another rank (see `Walk` for the formula, with K = 1)."""

    name = "ring"


class RingBlocking(Walk):
    """The same messages; `start` returns when the first has come, and the first send follows the local work."""

    name = "ring_blocking"
    blocking = True
