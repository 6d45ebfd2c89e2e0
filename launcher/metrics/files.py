"""The files of a run that metrics go to: metrics.jsonl (a record a line) and run.json (facts)."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METRICS, FACTS = "metrics.jsonl", "run.json"


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl in order; none if there is no file."""
    return [record for _, record in _records(folder / METRICS)]


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the line that a killed process or a full disk cut short
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield line, record


def keep_records(folder: Path, last_step: int) -> list[dict[str, Any]]:
    """Drop the records after `last_step`, and torn lines, from metrics.jsonl; returns those kept."""
    path = folder / METRICS
    kept = [(line, record) for line, record in _records(path) if record["step"] <= last_step]
    if path.exists():
        replace_file(path, b"".join(line + b"\n" for line, _ in kept))
    return [record for _, record in kept]


def set_aside(folder: Path) -> list[dict[str, Any]]:
    """Rename the metrics.jsonl of an earlier start, if it holds any, to metrics-1.jsonl (or -2, ...); returns none."""
    path = folder / METRICS
    if path.exists() and path.stat().st_size:
        number = next(n for n in itertools.count(1) if not (folder / f"metrics-{n}.jsonl").exists())
        path.rename(folder / f"metrics-{number}.jsonl")
    return []


def encode_record(record: dict[str, Any]) -> str:
    """One line of metrics.jsonl. JSON has no NaN or infinity: they become the strings that `float` reads back."""
    plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(plain, allow_nan=False) + "\n"


def read_facts(folder: Path) -> dict[str, Any]:
    """run.json, or nothing if there is none (or none that can be read)."""
    try:
        facts = json.loads((folder / FACTS).read_bytes())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write run.json in one piece."""
    replace_file(folder / FACTS, json.dumps(facts, indent=1, default=str).encode() + b"\n")


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, meets the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
