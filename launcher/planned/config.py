"""What a person may say about planned steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from longhaul.models.errors import UserError
from longhaul.parallel.planner.plan import DEFAULT_BUDGET

if TYPE_CHECKING:
    from longhaul.launcher.parallel_config import ParallelConfig


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


def check_planner(parallel: ParallelConfig) -> None:
    """Refuse what planned groups cannot be combined with, each with its reason."""
    if not parallel.planner.enabled:
        return
    if parallel.sequence_parallel_size != 1:
        raise UserError(
            f"parallel.sequence_parallel_size is {parallel.sequence_parallel_size}, but parallel.planner chooses it for every "
            "group: leave it out, or leave parallel.planner out."
        )
    if parallel.pipeline_parallel_size != 1:
        raise UserError(
            f"parallel.pipeline_parallel_size is {parallel.pipeline_parallel_size}: a pipeline passes on micro-batches of one "
            "size, from one group to the next, and those of parallel.planner differ in size and group; leave one of the two out."
        )
    if parallel.data_parallel_backend not in ("fsdp", "ddp"):
        raise UserError(
            f"parallel.data_parallel_backend {parallel.data_parallel_backend} counts micro-batches itself, but those of "
            "parallel.planner differ in number from step to step: use fsdp or ddp."
        )
    for name, two_levels, instead in (("exchange", "hierarchical", "log_scan"), ("attention", "usp", "ulysses")):
        if getattr(parallel, name) == two_levels:
            raise UserError(
                f"parallel.{name} {two_levels} needs one group inside a node and one across, but groups of parallel.planner "
                f"change at every micro-batch: use {instead}."
            )
    if parallel.layout_shares is not None:
        raise UserError(
            "parallel.layout_shares are of one group, but parallel.planner makes many: give the speeds of a "
            "parallel.planner.cluster file instead."
        )
