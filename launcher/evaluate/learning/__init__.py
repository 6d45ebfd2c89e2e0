"""What small models learn on synthetic tasks, on a CPU: `longhaul evaluate learning`. docs/results.md has the table."""

from .command import main

__all__ = ["main"]
