"""Cross-entropy of a linear head, without the whole matrix of logits."""

from .chunk import linear_cross_entropy
from .naive import naive_linear_cross_entropy

__all__ = ["linear_cross_entropy", "naive_linear_cross_entropy"]
