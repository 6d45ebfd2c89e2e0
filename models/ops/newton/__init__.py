"""h_t = A_t h_{t-1} + b_t, for all tokens at once: one step of Newton's method on a non-linear recurrence."""

from .chunk import AffineScan as AffineScan
