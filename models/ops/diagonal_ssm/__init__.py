"""s_t = exp(lambda) s_{t-1} + x_t with a constant complex diagonal: S4D and S5."""

from .chunk import DiagonalSSM as DiagonalSSM
