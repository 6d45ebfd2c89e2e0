"""Softmax attention over a sequence that many ranks hold."""
