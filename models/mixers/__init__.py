"""Layers that mix tokens: linear recurrences and softmax attention."""
