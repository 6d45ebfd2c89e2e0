"""Causal depthwise convolution over packed documents."""
