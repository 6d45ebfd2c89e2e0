"""Packages that only some data needs."""

from __future__ import annotations

import importlib
from typing import Any

from longhaul.models.errors import UserError


def require(module: str, wanted_by: str) -> Any:
    """Import `module`, or say which extra brings it.

    Args:
        module: name of an optional module.
        wanted_by: what cannot be read without it, for the message.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(
            f"Reading {wanted_by} needs the package {package}, which is not installed: pip install 'longhaul[data]'."
        ) from None
