"""`longhaul verify`: N ranks equal one, for outputs, states and every gradient on every rank."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Run the matrix (see `command`)."""
    from .command import main as command  # not before it runs: tests and tools import parts of this package

    return command(argv)
