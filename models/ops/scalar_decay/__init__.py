"""S_t = a_t S_{t-1} + k_t^T v_t with one decay a_t per head."""

from .chunk import ScalarDecay as ScalarDecay
