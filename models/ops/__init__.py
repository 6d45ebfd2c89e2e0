"""Tensors in, tensors out: one folder an operation."""
