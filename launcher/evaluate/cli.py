"""The command `longhaul evaluate`: a table of evaluations, each imported only when it runs."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from longhaul.models.errors import UserError

# Evaluation -> module with `main(argv) -> int`, and one line of help.
EVALUATIONS: dict[str, tuple[str, str]] = {
    "learning": ("longhaul.launcher.evaluate.learning", "what small models learn on synthetic tasks (needs no run)"),
    "memory": ("longhaul.launcher.evaluate.memory", "how well hidden states still tell earlier tokens and earlier layers"),
}


def main(argv: Sequence[str]) -> int:
    """Run one evaluation."""
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        lines = [f"  {name:8} {text}" for name, (_, text) in EVALUATIONS.items()]
        print("\n".join(["usage: longhaul evaluate NAME [RUN_FOLDER] [ARGUMENTS]", "", *lines]))
        return 0
    if name not in EVALUATIONS:
        raise UserError(f"There is no evaluation {name!r}: the evaluations are {', '.join(EVALUATIONS)}.")
    result: int = importlib.import_module(EVALUATIONS[name][0]).main(rest)
    return result
