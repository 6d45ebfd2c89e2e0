"""Metrics of a run: measured on every step, written on every `log_every`-th, by the main rank alone."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from longhaul.models.errors import UserError

from . import hardware
from .config import MetricsConfig
from .display import Display, NoDisplay, open_display
from .files import METRICS, encode_record, keep_records, read_facts, set_aside, write_facts

CONVENTIONS = {
    "throughput(tps)": "tokens of all ranks, padding excluded, over seconds and over processes: tokens/s per process; "
    "evaluation and checkpoints are not in the time, waiting for data is",
    "tflops": "model FLOPs, forward + backward = 3 x forward, recomputation not counted; softmax attention halved for "
    "causality; linear layers by their recurrent form, whatever chunks the kernel uses",
    "mfu(%)": "tflops over the device's dense peak",
    "memory/max_active(GiB)": "of the main rank: peak of active bytes on CUDA, peak resident set on CPU",
    "communication": "payload received by the main rank in one step, through counted collectives",
    "state_norm": "the largest Frobenius norm of a head's state after the first held-out stream; a collapsing state explodes",
    "effective_horizon": "of a recurrent layer: tokens after which less than exp(-20) of a state is left in its slowest head, at "
    "the mean decay of the first held-out stream; a mean, so no bound for single tokens; layers without decay, or with "
    "matrices as in delta rules, are left out",
}

RECEIVED, MESSAGES = "communication/received_bytes/", "communication/messages/"  # by label: the label follows
FORMULA = "communication/formula_bytes/"  # what should be received

STATE_NORM = "state_norm/max"
SHORTEST, MIDDLE = "effective_horizon/min(tokens)", "effective_horizon/median(tokens)"  # over recurrent layers

Value = float | torch.Tensor


class Traffic(Protocol):
    """A count of traffic, as `parallel.comm.Count` keeps it."""

    messages: int
    bytes: int


def traffic_of(counts: Mapping[tuple[str, str], Traffic]) -> dict[str, tuple[int, int]]:
    """Counts by (label, collective), a ledger's, summed to label -> (messages, bytes)."""
    result: dict[str, tuple[int, int]] = {}
    for (label, _), count in counts.items():
        messages, size = result.get(label, (0, 0))
        result[label] = (messages + count.messages, size + count.bytes)
    return result


class Metrics:
    """The metrics of one session of a run. Construct it on every rank: all but the main one do nothing.

    Throughput is that of the steps since the last record. The clock of a step runs from `start_step` to `log`, without
    what is done under `outside`.

    Args:
        config: how often, and where to.
        folder: of the run; metrics.jsonl, run.json and tensorboard/ are written there.
        is_main: whether this rank prints and writes.
        world_size: number of processes; throughput is divided by it.
        total_steps: of the run.
        resumed_step: the step that the session continues from. Records after it are dropped and the file goes on;
            0 starts a new file and sets an earlier one aside.
        flops_per_token: of the model, forward and backward; without it there are no FLOP/s and no MFU.
        device: whose memory and peak are meant.
    """

    def __init__(
        self,
        config: MetricsConfig,
        folder: Path,
        *,
        is_main: bool = True,
        world_size: int = 1,
        total_steps: int,
        resumed_step: int = 0,
        flops_per_token: float | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._config, self._folder = config, Path(folder)
        self._is_main, self._world_size = is_main, world_size
        self._total_steps, self._first_step = total_steps, resumed_step + 1
        self._flops_per_token, self._device = flops_per_token, torch.device(device)
        self._display: Display = NoDisplay()
        self._file: Any = None
        self._writer: Any = None
        self._facts: dict[str, Any] = {}
        self._closed = False
        self._started = time.perf_counter()
        self._paused = 0.0  # seconds of this step spent outside
        self._outside: dict[str, float] = {}  # this session's, by name
        self._loading = self._seconds = 0.0  # since the last record
        self._steps = self._tokens = self._tokens_seen = 0
        self._peak_flops = config.peak_flops
        if is_main:
            self._open(resumed_step)

    def _open(self, resumed_step: int) -> None:
        name = hardware.device_name(self._device)
        if self._peak_flops is None:
            self._peak_flops = hardware.peak_flops(name) if self._device.type == "cuda" else None
        hardware.reset_peak_memory(self._device)
        with _writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            kept = keep_records(self._folder, resumed_step) if resumed_step else set_aside(self._folder)
            self._file = (self._folder / METRICS).open("a", encoding="utf-8")
        self._tokens_seen = max((record.get("n_tokens_seen", 0) for record in kept), default=0)
        if self._config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and optional

            self._writer = SummaryWriter(str(self._folder / "tensorboard"), purge_step=self._first_step)
        earlier = read_facts(self._folder) if resumed_step else {}
        self._earlier_outside: dict[str, float] = earlier.get("outside_seconds", {})
        self._facts = {
            **earlier,
            "started": earlier.get("started", time.time()),
            "sessions": earlier.get("sessions", 0) + 1,
        }
        self.record(
            status="running", ended=None, world_size=self._world_size, device=name, versions=hardware.versions(),
            total_steps=self._total_steps, flops_per_token=self._flops_per_token, peak_flops=self._peak_flops,
            conventions=CONVENTIONS,
        )  # fmt: skip
        self._display = open_display(self._config.display, self._total_steps, resumed_step)
        self._display.message("tokens/s is per process, of steps alone (no evaluation, no checkpoints)." + self._mfu_note())

    def _mfu_note(self) -> str:
        if self._flops_per_token is None or self._peak_flops is None:
            return ""
        return f" MFU: {CONVENTIONS['tflops']}; peak {self._peak_flops / 1e12:.4g} TFLOP/s per process."

    def record(self, **facts: Any) -> None:
        """Merge facts (values that JSON can hold) into run.json."""
        if self._is_main:
            self._facts.update(facts)
            with _writing(self._folder):
                write_facts(self._folder, self._facts)

    def start_step(self) -> None:
        """The clock of a step starts: call it before its data are fetched."""
        self._started = time.perf_counter()
        self._paused = 0.0

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Time spent here is time the step waits for data."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._loading += time.perf_counter() - start

    @contextlib.contextmanager
    def outside(self, name: str) -> Iterator[None]:
        """Time spent here (`evaluation`, `checkpoint`) belongs to no step; it is summed by name."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._paused += seconds
            self._outside[name] = self._outside.get(name, 0.0) + seconds

    def due(self, step: int) -> bool:
        """Whether this step is recorded; the same on every rank. Steps count from 1."""
        return step in (self._first_step, self._total_steps) or step % self._config.log_every == 0

    def log(
        self,
        step: int,
        *,
        tokens: int,
        loss: Value | None = None,
        grad_norm: Value | None = None,
        learning_rate: float | None = None,
        traffic: Mapping[str, tuple[int, int]] | None = None,
        formula: Callable[[], Mapping[str, int]] | None = None,
        extra: Mapping[str, Value] | None = None,
    ) -> None:
        """A step has ended: call it after every step, on every rank.

        Args:
            step: which one, from 1.
            tokens: of the step, over all ranks, padding excluded.
            loss: nats per token over all ranks. It, `grad_norm` and `extra` are read only where the step is due, so
                that a step that is not recorded makes no device wait.
            grad_norm: before clipping.
            learning_rate: of the step.
            traffic: label -> (messages, bytes) received by this rank in this step alone.
            formula: label -> bytes that should have been received; asked for only where the step is due.
            extra: other metrics by key.
        """
        due = self.due(step)
        if not self._is_main:
            return
        named = {"loss_metrics/global_avg_loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate}
        # Reading a value waits for the device: before the clock is read, so that the time is that of the work.
        values = {key: float(value) for key, value in {**named, **(extra or {})}.items() if value is not None and due}
        now = time.perf_counter()
        self._seconds += now - self._started - self._paused
        self._started, self._paused = now, 0.0
        self._steps += 1
        self._tokens += tokens
        self._tokens_seen += tokens
        self._display.advance(step)
        if not due:
            return
        values |= self._measured() | _traffic_metrics(traffic)
        if formula is not None:
            values |= {f"{FORMULA}{label}": size for label, size in formula().items()}
        self._display.record(step, values)
        self._write(step, values)
        self._loading = self._seconds = 0.0
        self._steps = self._tokens = 0

    def _measured(self) -> dict[str, float]:
        """What the clock and the device say about the steps since the last record."""
        rate = self._tokens / max(self._seconds, 1e-9) / self._world_size
        values: dict[str, float] = {"throughput(tps)": rate}
        if self._flops_per_token is not None:
            values["tflops"] = rate * self._flops_per_token / 1e12
            if self._peak_flops is not None:
                values["mfu(%)"] = 100 * rate * self._flops_per_token / self._peak_flops
        return values | {
            "time_metrics/end_to_end(s)": self._seconds / self._steps,
            "time_metrics/data_loading(s)": self._loading / self._steps,
            "memory/max_active(GiB)": hardware.peak_memory_gib(self._device),
            "n_tokens_seen": self._tokens_seen,
        }

    def log_evaluation(self, step: int, loss: float, tokens: int | None = None) -> None:
        """The held-out loss after `step`, nats per token, over `tokens` tokens."""
        if not self._is_main:
            return
        values = {"validation_metrics/global_avg_loss": float(loss)}
        self._write(step, values)
        counted = f" over {tokens:,} tokens" if tokens is not None else ""
        self._display.message(f"step {step}: held-out loss {loss:.4f} nats per token{counted}")

    def log_state_norm(self, step: int, norm: float) -> None:
        """The largest norm of a head's state at the end of a held-out stream, after `step`."""
        if self._is_main:
            self._write(step, {STATE_NORM: norm})
            self._display.message(f"step {step}: largest norm of a head's state {norm:,.3g}")

    def log_horizon(self, step: int, shortest: float, middle: float) -> None:
        """The effective horizon after `step`, in tokens: of the layer with the shortest, and the median over layers."""
        if not self._is_main:
            return
        self._write(step, {SHORTEST: shortest, MIDDLE: middle})
        found = f"{shortest:,.0f} tokens in the layer that looks back least, {middle:,.0f} in the median one"
        self._display.message(f"step {step}: effective horizon {found}")

    def message(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        self._display.message(text)

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        with _writing(self._folder):
            self._file.write(encode_record({"step": step, "time": time.time(), **values}))
            self._file.flush()
        if self._writer is not None:
            for key, value in values.items():
                self._writer.add_scalar(key, value, step)

    def close(self, status: str = "finished") -> None:
        """Write what is left and note how the session ended. A second call does nothing."""
        if self._closed or not self._is_main:
            return
        self._closed = True
        self._display.close()
        if self._writer is not None:
            self._writer.close()
        with contextlib.suppress(OSError):  # a full disk has been reported by the write that met it
            self._file.close()
        names = {**self._earlier_outside, **self._outside}
        total = {name: self._earlier_outside.get(name, 0.0) + self._outside.get(name, 0.0) for name in names}
        self.record(status=status, ended=time.time(), outside_seconds=total)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
        elif isinstance(error, KeyboardInterrupt):
            self.close("interrupted")
        else:
            self.close(f"failed: {type(error).__name__}: {error}")


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """A disk that is full, or a folder that cannot be written, is a sentence and not a traceback."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"Cannot write metrics to the run folder {folder} ({error.strerror}): free space, or set another folder."
        ) from error


def _traffic_metrics(traffic: Mapping[str, tuple[int, int]] | None) -> dict[str, float]:
    if traffic is None:
        return {}
    values: dict[str, float] = {
        "communication/received(MiB)": sum(size for _, size in traffic.values()) / 2**20,
        "communication/messages": sum(messages for messages, _ in traffic.values()),
    }
    for label, (messages, size) in traffic.items():
        values |= {f"{RECEIVED}{label}": size, f"{MESSAGES}{label}": messages}
    return values
