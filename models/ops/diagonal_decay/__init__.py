"""S_t = diag(exp(a_t)) S_{t-1} + k_t^T v_t with one decay per head and key channel."""

from .chunk import DiagonalDecay as DiagonalDecay
