"""Cells of the matrix on test ranks, with a bug in the product or without."""

from __future__ import annotations

from typing import Any

from longhaul.launcher.verify.cells import Cell
from longhaul.launcher.verify.check import Checker
from longhaul.launcher.verify.ranks import Answer
from longhaul.launcher.verify.topologies.job import Asked, check
from longhaul.models.errors import UserError
from longhaul.parallel.runtime import Runtime

from . import bugs

_checkers: dict[int, Checker] = {}


def checked(rank: int, world_size: int, bug: str, cells: list[Any]) -> list[Any]:
    """This rank's answers on cells, under a bug."""
    if world_size not in _checkers:  # groups are made once in a rank's life
        _checkers[world_size] = Checker(Runtime(rank, world_size, device="cpu"))
    checker = _checkers[world_size]
    checker.references.clear()
    with getattr(bugs, bug)():
        found = [tuple(Answer("findings", checker.check(Cell(*fields)))) for fields in cells]
    checker.references.clear()
    return found


def case_checked(rank: int, world_size: int, asked: Asked) -> Any:
    """This rank's answer on a case of a topology."""
    try:
        return tuple(Answer("findings", check(asked, Runtime(rank, world_size, rank, device="cpu"))))
    except UserError as error:
        return tuple(Answer("refused", {}, str(error)))
