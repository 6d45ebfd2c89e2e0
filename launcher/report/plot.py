"""The curves of a run as one SVG."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from longhaul.launcher.metrics.metrics import MIDDLE, SHORTEST

from .collect import HELD_OUT, LOSS, RATE

Curve = Sequence[tuple[int, float]]

INK, MUTED, GRID = "#1f2933", "#6b7785", "#e3e8ee"
BLUE, ORANGE = "#2563eb", "#d9480f"
_MOST_POINTS = 1500
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED,
    "ytick.color": MUTED, "axes.edgecolor": GRID, "axes.grid": True, "axes.grid.axis": "y", "grid.color": GRID,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "xtick.major.size": 0,
    "ytick.major.size": 0, "svg.hashsalt": "longhaul", "axes.axisbelow": True,
}  # fmt: skip


def draw(report: dict[str, Any]) -> str:
    """Loss (training, held-out, baselines) above throughput, and the effective horizon if it was measured, as an SVG element."""
    # No pyplot: a report must not touch the user's backend or leave figures behind.
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    with matplotlib.rc_context(_STYLE):
        curves: dict[str, Curve] = report["curves"]
        reaches = any(math.isfinite(value) for _, value in curves[MIDDLE])
        figure = Figure(figsize=(9.2, 6.6 if reaches else 5.4), layout="constrained")
        FigureCanvasSVG(figure)
        top, bottom, *more = figure.subplots(2 + reaches, 1, sharex=True, height_ratios=(3, 1, 1)[: 2 + reaches])
        _draw_loss(top, curves[LOSS], curves[HELD_OUT], report["facts"].get("baselines") or {})
        rate = _thin(curves[RATE])
        bottom.plot(*_axes(rate), color=BLUE, linewidth=1.2)
        bottom.set_ylim(bottom=0)
        bottom.margins(x=0.01)
        bottom.yaxis.set_major_formatter(EngFormatter(sep=""))
        bottom.yaxis.set_major_locator(MaxNLocator(3))
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
        _title(bottom, "Tokens per second per process")
        for axes in more:
            _draw_horizon(axes, curves[SHORTEST], curves[MIDDLE])
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
            if axes.get_yscale() == "linear":
                axes.yaxis.set_major_locator(MaxNLocator(3))
        (more or [bottom])[-1].set_xlabel("step")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _draw_loss(axes: Any, train: Curve, held_out: Curve, baselines: dict[str, float]) -> None:
    _title(axes, "Loss, nats per token")
    points = _thin(train)
    smooth = _smooth(points)
    if points:
        axes.plot(*_axes(points), color=BLUE, linewidth=0.8, alpha=0.3 if len(points) > 20 else 1.0)
        axes.plot(*_axes(smooth), color=BLUE, linewidth=1.8, label="training")
    if held_out:
        axes.plot(*_axes(held_out), color=ORANGE, linewidth=1.8, marker="o", markersize=4, label="held-out documents")
    for name, value in baselines.items():
        axes.axhline(value, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"{name} {value:.2f}", (1, value), xycoords=("axes fraction", "data"), xytext=(-2, 3),
            textcoords="offset points", ha="right", va="bottom", color=MUTED, fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}, zorder=5,
        )  # fmt: skip
    seen = [value for _, value in (*points, *held_out) if math.isfinite(value)] + list(baselines.values())
    if seen:
        # A diverged run must not flatten the rest: the view ends a little above the baselines, or the usual loss.
        ceiling = max([*baselines.values(), *sorted(seen)[: max(1, int(0.98 * len(seen)))]])
        margin = 0.08 * max(ceiling - min(seen), 0.1)
        axes.set_ylim(min(seen) - margin, ceiling + margin)
    if points or held_out:
        axes.legend(frameon=False, loc="lower left", ncols=2, borderaxespad=0.2)


def _draw_horizon(axes: Any, shortest: Curve, middle: Curve) -> None:
    _title(axes, "Effective horizon of recurrent layers, tokens")
    for curve, color, label in ((middle, BLUE, "median layer"), (shortest, ORANGE, "layer that looks back least")):
        finite = [(step, value) for step, value in curve if math.isfinite(value)]
        axes.plot(*_axes(finite), color=color, linewidth=1.4, marker="o", markersize=3, label=label)
    seen = [value for _, value in (*shortest, *middle) if math.isfinite(value)]
    if max(seen) > 30 * min(seen):
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.6 * max(seen))  # room for the legend
    axes.margins(x=0.01)
    axes.legend(frameon=False, loc="upper left", ncols=2, borderaxespad=0.2)


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, fontweight="bold", color=INK)


def _axes(curve: Curve) -> tuple[list[int], list[float]]:
    return [step for step, _ in curve], [value for _, value in curve]


def _thin(curve: Curve) -> Curve:
    """At most `_MOST_POINTS` points: the means of equal bins."""
    if len(curve) <= _MOST_POINTS:
        return curve
    size = -(-len(curve) // _MOST_POINTS)
    bins = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [(points[-1][0], sum(value for _, value in points) / len(points)) for points in bins]


def _smooth(curve: Curve) -> Curve:
    """Mean over a window of about a thirtieth of the run; it shrinks at the ends, so that it stays centred."""
    half = len(curve) // 60
    result = []
    for index, (step, _) in enumerate(curve):
        reach = min(half, index, len(curve) - 1 - index)
        window = [value for _, value in curve[index - reach : index + reach + 1]]
        result.append((step, sum(window) / len(window)))
    return result
