"""The page: one HTML file that needs nothing else."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from .collect import HELD_OUT, LOSS

_CSS = """
body{margin:0;background:#f6f7f9;color:#1f2933;
font:15px/1.5 system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif}
main{max-width:960px;margin:0 auto;padding:28px 24px 48px}
h1{font-size:26px;margin:0}h2{font-size:16px;margin:0 0 10px}
.sub{color:#6b7785;margin:2px 0 18px}
.bad{color:#b42318;font-weight:600}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:12px;margin-bottom:14px}
.tile,section{background:#fff;border:1px solid #e3e8ee;border-radius:8px}
.tile{padding:12px 14px}.tile b{display:block;font-size:22px;line-height:1.25;font-variant-numeric:tabular-nums}
.tile span{color:#6b7785;font-size:13px}
section{padding:16px 18px;margin-bottom:14px}
svg{width:100%;height:auto;display:block}
.columns{display:grid;grid-template-columns:1fr 1fr;gap:0 14px}.columns>section{min-width:0}
@media(max-width:720px){.columns{grid-template-columns:1fr}}
table{border-collapse:collapse;width:100%;font-size:14px}
td,th{padding:3px 12px 3px 0;text-align:left;vertical-align:top;border-bottom:1px solid #eef1f4;overflow-wrap:anywhere}
tr:last-child td{border-bottom:0}th{color:#6b7785;font-weight:500}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.k{color:#6b7785;width:38%}
pre{margin:0;font:13px/1.45 ui-monospace,"DejaVu Sans Mono",monospace;white-space:pre-wrap;overflow-wrap:anywhere;
background:#f6f7f9;border-radius:6px;padding:10px 12px;max-height:420px;overflow:auto}
small,.note{color:#6b7785;font-size:13px}details summary{cursor:pointer;font-weight:600}
@media print{body{background:#fff}pre{max-height:none}}
"""


def render(report: dict[str, Any], svg: str) -> str:
    """The page, from what `collect` found and the curves."""
    facts = report["facts"]
    title = escape(str(report["title"]))
    parts = [
        f"<h1>{title}</h1>",
        f'<p class="sub">{_status(report)}</p>',
        _tiles(report),
        f"<section>{svg}</section>",
        '<div class="columns">',
        _section("Model", _table({"parameters": _count(facts.get("parameters")), **(facts.get("model") or {})})),
        _section("Run", _table(_run(report))),
        "</div>",
        _section("Communication in one step", _traffic(report)),
        _section("What the engines measured and chose", _pre("\n".join(facts.get("engines") or []))),
        _section("Generated sample", _pre(report["sample"])),
        _section("Started with", _pre(facts.get("command"))),
        _section("To go on", _pre(facts.get("resume_command"))),
        _details("Where the time went", _table({name: duration(value) for name, value in report["seconds"].items()})),
        _details("Data", _table(facts.get("data") or {})),
        _details("Configuration", _pre(report["config"])),
        _details("How the numbers are measured", _table(_conventions(facts))),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}: training report</title><style>{_CSS}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def _status(report: dict[str, Any]) -> str:
    total = report["total_steps"]
    steps = f"{report['last_step']:,} of {total:,} steps" if total else f"{report['last_step']:,} steps"
    started = report["facts"].get("started")
    when = f", started {time.strftime('%Y-%m-%d %H:%M', time.localtime(started))}" if started else ""
    status = str(report["status"])
    if status == "finished":
        return f"Training report: finished, {steps}{when}."
    if status in ("running", "unknown"):
        status = "not finished (still running, or killed)"
    return f'Training report: <span class="bad">{escape(status)}</span>, {steps}{when}.'


def _tiles(report: dict[str, Any]) -> str:
    baselines: Mapping[str, float] = report["facts"].get("baselines") or {}
    beside = ", ".join(f"{name} {value:.2f}" for name, value in baselines.items())
    held_out, train = report["final"][HELD_OUT], report["final"][LOSS]
    tiles = [
        (_number(held_out, "{:.3f}"), "held-out loss, nats/token" + (f"; {beside}" if beside else "")),
        (_number(train, "{:.3f}"), "training loss of the last step"),
        (_number(report["throughput"], "{:,.0f}"), "tokens/s per process"),
        (_number(report["mfu"], "{:.1f}%"), f"MFU ({_number(report['tflops'], '{:.1f}')} TFLOP/s per process)"),
        ("" if report["step_seconds"] is None else duration(report["step_seconds"]), "a step"),
        (_number(report["memory_gib"], "{:.2f} GiB"), "peak memory of the main rank"),
        (_mebibytes(report["received_mib"]), "received by a rank in a step"),
        (_count(report["tokens_seen"]), "tokens trained on"),
        (_count(report["horizon"]["median"]), _horizon(report["horizon"]["shortest"])),
    ]
    cells = [f'<div class="tile"><b>{value}</b><span>{escape(name)}</span></div>' for value, name in tiles if value]
    return f'<div class="tiles">{"".join(cells)}</div>'


def _run(report: dict[str, Any]) -> dict[str, Any]:
    facts = report["facts"]
    degrees = {name: value for name, value in (facts.get("parallel") or {}).items() if value is not None}
    versions = facts.get("versions") or {}
    return {
        "processes": facts.get("world_size"),
        "parallel": ", ".join(f"{name} {value}" for name, value in degrees.items()),
        "device": facts.get("device"),
        "number type": facts.get("dtype"),
        "versions": ", ".join(f"{name} {value}" for name, value in versions.items() if name != "cores"),
        "sessions": facts.get("sessions"),
    }


def _horizon(shortest: float | None) -> str:
    return f"tokens of effective horizon in the median recurrent layer; least {_count(shortest)}"


def _traffic(report: dict[str, Any]) -> str:
    rows = report["traffic"]
    if not rows:
        return '<p class="note">None: one process holds the whole sequence.</p>' if report["received_mib"] == 0 else ""
    known = [row for row in rows if row["formula"] is not None]
    head = "<tr><th>what</th><th class=n>messages</th><th class=n>bytes received</th>"
    head += "<th class=n>bytes by formula</th><th class=n>equal in steps</th></tr>" if known else "</tr>"
    body = []
    for row in sorted(rows, key=lambda row: row["formula"] is None):
        numbers = [_number(row[key], "{:,.0f}") for key in ("messages", "bytes", *(["formula"] if known else []))]
        if known:
            wrong = row["equal"] < row["records"]
            counted = f"{row['equal']:,} of {row['records']:,}" if row["records"] else ""
            numbers.append(f'<span class="bad">{counted}</span>' if wrong else counted)
        body.append(f"<tr><td>{escape(row['label'])}</td>{''.join(f'<td class=n>{each}</td>' for each in numbers)}</tr>")
    note = "Payload that the main rank received, counted on the wire; median over recorded steps."
    if known:
        note += " The formula is computed for the documents of each step; what has none is left empty."
    return f'<table>{head}{"".join(body)}</table><p class="note">{note}</p>'


def _conventions(facts: Mapping[str, Any]) -> dict[str, str]:
    found = dict(facts.get("conventions") or {})
    if facts.get("peak_flops"):
        found["peak"] = f"{facts['peak_flops'] / 1e12:.4g} TFLOP/s per process"
    if facts.get("flops_per_token"):
        found["FLOPs of a token"] = f"{facts['flops_per_token']:,.0f}, forward and backward"
    return found


def _table(rows: Mapping[str, Any]) -> str:
    cells = [
        f'<tr><td class="k">{escape(str(name))}</td><td>{escape(_plain(value))}</td></tr>'
        for name, value in rows.items()
        if value not in (None, "")
    ]
    return f"<table>{''.join(cells)}</table>" if cells else ""


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(entry)}" for name, entry in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(_plain(entry) for entry in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _details(title: str, content: str) -> str:
    return f"<section><details><summary>{escape(title)}</summary><br>{content}</details></section>" if content else ""


def _pre(text: str | None) -> str:
    return f"<pre>{escape(text.rstrip())}</pre>" if text and text.strip() else ""


def _number(value: float | None, text: str) -> str:
    return "" if value is None else text.format(value)


def _count(value: float | None) -> str:
    if value is None:
        return ""
    if math.isinf(value):
        return "endless"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


def _mebibytes(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f} MiB" if value >= 0.1 or value == 0 else f"{value * 1024:.1f} KiB"


def duration(seconds: float) -> str:
    """3725 -> 1 h 2 min."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
