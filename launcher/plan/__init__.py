"""Which documents run together on which ranks, explained before anything trains: `longhaul plan`."""

from .cli import main

__all__ = ["main"]
