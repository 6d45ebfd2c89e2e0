"""What a run's files say, as one plain dictionary: the content of report.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from longhaul.launcher.metrics.files import METRICS, read_facts, read_records
from longhaul.launcher.metrics.metrics import FORMULA, MESSAGES, MIDDLE, RECEIVED, SHORTEST
from longhaul.models.errors import UserError

LOSS, HELD_OUT = "loss_metrics/global_avg_loss", "validation_metrics/global_avg_loss"
RATE, SECONDS, LOADING = "throughput(tps)", "time_metrics/end_to_end(s)", "time_metrics/data_loading(s)"
MEMORY, MIB, SEEN = "memory/max_active(GiB)", "communication/received(MiB)", "n_tokens_seen"

_OPTIONAL_FILES = {"sample": "sample.txt", "config": "resolved_config.yaml"}


def collect(folder: Path) -> dict[str, Any]:
    """Everything that the page shows.

    Raises:
        UserError: the folder holds no metrics.
    """
    records = read_records(folder)
    if not records:
        raise UserError(f"{folder} holds no {METRICS} with a record in it: give the folder of a run that made a step.")
    facts = read_facts(folder)
    steps = [record for record in records if RATE in record]
    seconds, loading = _seconds(steps)
    report: dict[str, Any] = {
        "title": facts.get("title") or folder.resolve().name,
        "status": facts.get("status", "unknown"),
        "last_step": max(record["step"] for record in records),
        "total_steps": facts.get("total_steps"),
        "tokens_seen": int(max((record.get(SEEN, 0) for record in steps), default=0)),
        "curves": {key: _curve(records, key) for key in (LOSS, HELD_OUT, RATE, "grad_norm", "learning_rate", SHORTEST, MIDDLE)},
        "final": {key: _last(records, key) for key in (LOSS, HELD_OUT)},
        "throughput": _typical(steps, RATE),
        "tflops": _typical(steps, "tflops"),
        "mfu": _typical(steps, "mfu(%)"),
        "step_seconds": _typical(steps, SECONDS),
        "memory_gib": max((record[MEMORY] for record in steps if MEMORY in record), default=None),
        "received_mib": _typical(steps, MIB),
        "traffic": _traffic(steps),
        "horizon": {"shortest": _last(records, SHORTEST), "median": _last(records, MIDDLE)},
        "seconds": {"training": seconds, "of it waiting for data": loading, **(facts.get("outside_seconds") or {})},
        "facts": facts,
    }
    for name, file in _OPTIONAL_FILES.items():
        path = folder / file
        report[name] = path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
    return report


def _curve(records: Sequence[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(record["step"], float(record[key])) for record in records if key in record]


def _last(records: Sequence[dict[str, Any]], key: str) -> float | None:
    curve = _curve(records, key)
    return curve[-1][1] if curve else None


def _typical(steps: Sequence[dict[str, Any]], key: str) -> float | None:
    """The median over the records; the first is left out, since it holds what is paid only once."""
    values = [float(record[key]) for record in steps if key in record]
    return median(values[1:] or values) if values else None


def _seconds(steps: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Seconds in steps, and those of them spent waiting for data; a record speaks for the steps since the last."""
    total = loading = 0.0
    before = 0
    for record in steps:
        count = record["step"] - before
        total += count * record.get(SECONDS, 0.0)
        loading += count * record.get(LOADING, 0.0)
        before = record["step"]
    return total, loading


def _traffic(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per label: bytes and messages received in a usual step, beside the bytes that the formula gives, and in how many of the
    records with a formula the two are equal."""
    prefixes = (RECEIVED, FORMULA)
    labels = {key.removeprefix(each): None for each in prefixes for record in steps for key in record if key.startswith(each)}
    rows = []
    for label in labels:
        known = [record for record in steps if FORMULA + label in record]
        rows.append({
            "label": label,
            "messages": _typical(steps, MESSAGES + label),
            "bytes": _typical(steps, RECEIVED + label),
            "formula": _typical(known, FORMULA + label),
            "records": len(known),
            "equal": sum(record.get(RECEIVED + label, 0) == record[FORMULA + label] for record in known),
        })  # fmt: skip
    return rows
