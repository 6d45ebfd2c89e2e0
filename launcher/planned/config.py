"""What a person may say about planned steps."""

from __future__ import annotations

from dataclasses import dataclass

from longhaul.models.errors import UserError
from longhaul.parallel.planner.plan import DEFAULT_BUDGET


@dataclass(frozen=True, kw_only=True)
class PlannerConfig:
    """A plan for each step: which documents run together, on how many and on which processes (docs/planner.md)."""

    enabled: bool = False
    """Plan each step. Every micro-batch then has groups of its own; parallel.sequence_parallel_size stays 1."""

    memory_tokens: int | None = None
    """Tokens whose activations fit on a process; what the cluster file says if left out."""

    cluster: str | None = None
    """Cluster file, or the name of a shipped one, as longhaul plan reads: memory, links, speeds. If left out, links are
    measured at the start and all processes count as equally fast."""

    calibration: str | None = None
    """File of longhaul plan calibrate: what layers cost on this machine. Published constants if left out."""

    learn: bool = True
    """Follow the measured times of the steps. Plans then depend on the clock, and sums on plans, by rounding."""

    ahead: int = 1
    """Steps that are planned in the background while one trains."""

    budget: int = DEFAULT_BUDGET
    """Work of a plan, in placements of a document."""

    def __post_init__(self) -> None:
        for name in ("memory_tokens", "ahead", "budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"parallel.planner.{name} is {value}: give 1 or more.")
