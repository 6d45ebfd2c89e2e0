"""Softmax attention over a sharded sequence, one engine a file."""
