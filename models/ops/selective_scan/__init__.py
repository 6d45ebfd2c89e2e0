"""h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t, elementwise: the selective scan of Mamba-1."""

from .chunk import SelectiveScan as SelectiveScan
