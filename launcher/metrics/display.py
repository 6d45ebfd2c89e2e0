"""What a person sees while a run goes on: a progress bar on a terminal, one plain line a record elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Display(Protocol):
    """Where steps and messages are shown."""

    def advance(self, step: int) -> None:
        """A step is done, recorded or not."""

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """The metrics of a recorded step."""

    def message(self, text: str) -> None:
        """A line of its own."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class NoDisplay:
    """Shows nothing: for the other ranks."""

    def advance(self, step: int) -> None: ...

    def record(self, step: int, values: Mapping[str, float]) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


class PlainDisplay:
    """One line a record, for files and pipes."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps

    def advance(self, step: int) -> None: ...

    def record(self, step: int, values: Mapping[str, float]) -> None:
        width = len(str(self._total_steps))
        print(f"step {step:>{width}}/{self._total_steps}  {summary(values)}", flush=True)

    def message(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None: ...


class RichDisplay:
    """A progress bar with the last record beside it; messages scroll above it."""

    def __init__(self, total_steps: int, done: int, console: Console | None = None) -> None:
        self._progress = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(), TextColumn("{task.fields[summary]}"), console=console or Console(),
            refresh_per_second=4,
        )  # fmt: skip
        self._task = self._progress.add_task("train", total=total_steps, completed=done, summary="")
        self._progress.start()

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        self._progress.update(self._task, completed=step, summary=summary(values))

    def message(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()


# Short names of the line, in its order: metric key -> format.
_SUMMARY = {
    "loss_metrics/global_avg_loss": "loss {:.4f}",
    "grad_norm": "grad_norm {:.3f}",
    "learning_rate": "lr {:.2e}",
    "throughput(tps)": "{:,.0f} tokens/s/process",
    "tflops": "tflops {:.3g}",
    "mfu(%)": "mfu {:.1f}%",
    "memory/max_active(GiB)": "memory {:.2f}GiB",
    "communication/received(MiB)": "received {:.2f}MiB",
}


def summary(values: Mapping[str, float]) -> str:
    """The metrics of a step on one line."""
    return "  ".join(text.format(values[key]) for key, text in _SUMMARY.items() if key in values)


def open_display(kind: str, total_steps: int, done: int) -> Display:
    """The display that `metrics.display` names."""
    if kind == "none":
        return NoDisplay()
    if kind == "rich" or (kind == "auto" and Console().is_terminal):
        return RichDisplay(total_steps, done)
    return PlainDisplay(total_steps)
