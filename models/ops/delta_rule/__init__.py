"""S_t = (I + e_t^T b_t) diag(w_t) S_{t-1} + k_t^T v_t: every delta rule."""

from .chunk import DeltaRule as DeltaRule
from .chunk import delta_inputs as delta_inputs
