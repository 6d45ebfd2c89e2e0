"""Mixers: what exchanges information between tokens. One file each."""
