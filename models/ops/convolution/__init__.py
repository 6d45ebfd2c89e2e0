"""Causal depthwise convolution over packed documents."""

from .chunk import causal_conv
from .naive import naive_causal_conv

__all__ = ["causal_conv", "naive_causal_conv"]
