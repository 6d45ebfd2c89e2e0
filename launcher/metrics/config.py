"""What a person may say about the metrics of a run."""

from __future__ import annotations

from dataclasses import dataclass

from longhaul.models.errors import UserError

DISPLAYS = ("auto", "rich", "plain", "none")


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """How often a run reports, and where to."""

    log_every: int = 1
    """Steps from one record to the next; the first step of a session and the last step are always recorded."""

    tensorboard: bool = False
    """Also write TensorBoard events, to the folder `tensorboard` of the run."""

    display: str = "auto"
    """`rich`: a progress bar; `plain`: a line a record; `none`: nothing; `auto`: rich on a terminal, else plain."""

    peak_flops: float | None = None
    """Peak FLOP/s of one process's device, for MFU; by default that of the GPU if it is a known one, else no MFU."""

    horizon_every: int = 0
    """Steps between measurements of the effective horizon of recurrent layers (tokens after which less than exp(-20) of a state
    is left, at the mean decay of a held-out stream, in each layer's slowest head) and of the largest norm of a head's state
    at its end, which explodes where a state collapses. Costs a forward each time; 0 never measures."""

    def __post_init__(self) -> None:
        if self.horizon_every < 0:
            raise UserError(f"metrics.horizon_every is {self.horizon_every}: give a number of steps, or 0 to measure never.")
        if self.log_every < 1:
            raise UserError(f"metrics.log_every is {self.log_every}: set it to 1 or more steps.")
        if self.display not in DISPLAYS:
            raise UserError(f"metrics.display is {self.display!r}: choose one of {', '.join(DISPLAYS)}.")
        if self.peak_flops is not None and not self.peak_flops > 0:
            raise UserError(f"metrics.peak_flops is {self.peak_flops}: give FLOP/s above 0, or leave it out.")
