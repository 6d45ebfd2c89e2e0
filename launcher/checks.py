"""Checks of single keys, for the dataclasses of a configuration."""

from __future__ import annotations

from longhaul.models.errors import UserError


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """UserError unless a key's value is one of its choices."""
    if value not in choices:
        raise UserError(f"{name} is {value!r}: give {', '.join(choices[:-1])} or {choices[-1]}.")


def at_least(name: str, value: float, least: float) -> None:
    """UserError if a key's value is below `least`, or NaN."""
    if not value >= least:  # true for NaN
        raise UserError(f"{name} is {value}: give {least} or more.")
