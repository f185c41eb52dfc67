"""Plots of one thing against bytes, steps or width: loss, pace, cost of a step.

Plain lists and dicts in, a matplotlib Figure out. Nothing here knows what a run folder is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tritwise.report.figures import (
    BLUE,
    FAINT,
    INK,
    MUTED,
    PAPER,
    VERMILION,
    look,
    new_figure,
    sequence_colours,
    spread,
)
from tritwise.report.numbers import tick, tick_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TICK_DIGITS = (
    (
        1,
        1.1,
        1.2,
        1.3,
        1.4,
        1.5,
        1.6,
        1.7,
        1.8,
        1.9,
        2,
        2.2,
        2.4,
        2.6,
        2.8,
        3,
        3.25,
        3.5,
        3.75,
        4,
        4.5,
        5,
        5.5,
        6,
        7,
        8,
        9,
    ),
    (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9),
    (1, 1.5, 2, 3, 4, 6, 8),
    (1, 2, 5),
    (1,),
)
Line = tuple[Sequence[float], Sequence[float]]  # xs, ys of equal length, finite


def loss_figure(train: Line, val: Line, ladder: Sequence[tuple[str, float]]) -> Figure:
    """Loss against bytes seen: `train` faint with a running mean, `val` as points, `ladder` (name, nats) as lines.

    Losses are nats per byte and positive; the right axis shows the same as bits per byte. The axis is logarithmic
    because a run starts at the uniform model's 5.5 and what matters happens within a tenth of its end.
    """
    with look():
        figure, (axes,) = new_figure(4.3)
        smooth = running_mean(train[1], max(1, len(train[1]) // 40))
        if train[0]:
            axes.plot(*thin(*train), color=BLUE, alpha=0.28, linewidth=0.8)
            axes.plot(*thin(train[0], smooth), color=BLUE, label="train, running mean", **_dot(train))
        if val[0]:
            axes.plot(*val, color=VERMILION, marker="o", markersize=4.5, markeredgecolor=PAPER, label="validation")
            axes.annotate(
                f"{val[1][-1]:.3f}",
                (val[0][-1], val[1][-1]),
                (0, -7),  # below: the names of the ladder's lines stand at the right
                textcoords="offset points",
                ha="center",
                va="top",
                color=VERMILION,
                fontweight="bold",
                fontsize=9,
            )
        shown = [*smooth, *val[1], *(nats for _, nats in ladder)]
        low, high = min(shown) / 1.06, max(shown) * 1.04
        if high < 1.4 * low:  # a single point, or a run too young to have moved
            low, high = low / 1.2, high * 1.2
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        axes.set_yticks(log_ticks(low, high), minor=False)
        axes.set_yticks([], minor=True)
        axes.yaxis.set_major_formatter(lambda value, _: tick(value))
        axes.set_title("Nats per byte, log scale")
        bytes_axis(axes)
        end = max([*train[0][-1:], *val[0][-1:]], default=1) or 1
        axes.set_xlim(-0.015 * end, 1.2 * end)  # room at the right for the names of the lines
        axes.set_xticks([place for place in axes.get_xticks() if 0 <= place <= end])
        right = axes.twinx()
        right.set_yscale("log")
        right.set_ylim(low / math.log(2), high / math.log(2))
        right.set_yticks(log_ticks(low / math.log(2), high / math.log(2)), minor=False)
        right.set_yticks([], minor=True)
        right.yaxis.set_major_formatter(lambda value, _: tick(value))
        right.grid(False)
        right.set_title("bits per byte", loc="right")
        _ladder_lines(axes, ladder, low, high)
        if train[0] or val[0]:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, borderaxespad=0.2)
    return figure


def pace_figure(rate: Line, bytes_per_second: Line, skipped: Sequence[float]) -> Figure:
    """Panels against steps: the rate (in leading trits a step) and the bytes trained on each second, if there are any.

    `skipped` are the steps at which a non-finite gradient was skipped, drawn as marks along the bottom of the first.
    """
    with look():
        panels = [line for line in (rate, bytes_per_second) if line[0]]
        figure, cells = new_figure(0.6 + 2.0 * max(1, len(panels)), rows=max(1, len(panels)), sharex=True)
        for axes, line in zip(cells, panels, strict=False):
            axes.margins(x=0.02)
            if line is rate:
                axes.plot(*thin(*line), color=BLUE, **_dot(line))
                axes.set_title("Rate, leading trits per step")
                axes.yaxis.set_major_formatter(lambda value, _: tick(value))
                axes.set_ylim(bottom=min(0, *line[1]))
            else:
                smooth = running_mean(line[1], max(1, len(line[1]) // 40))
                axes.plot(*thin(*line), color=BLUE, alpha=0.28, linewidth=0.8)
                axes.plot(*thin(line[0], smooth), color=BLUE, **_dot(line))
                axes.set_title("Throughput, bytes per second")
                axes.yaxis.set_major_formatter(lambda value, _: tick_bytes(value))
                axes.set_ylim(0, 1.2 * max(smooth) if max(smooth) > 0 else 1)
        if skipped:
            marks = {"color": VERMILION, "linestyle": "", "marker": "|", "markersize": 11, "markeredgewidth": 1.6}
            place = cells[0].get_xaxis_transform()
            cells[0].plot(skipped, [0.03] * len(skipped), **marks, clip_on=False, transform=place, label="skipped step")
            cells[0].legend(loc="upper right")
        cells[-1].set_xlim(left=0)
        cells[-1].xaxis.set_major_formatter(lambda value, _: tick(value))
        cells[-1].set_xlabel("steps")
    return figure


def step_cost_figure(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Cost of a step from rows with "width", "batch", "tritwise_ms", "adamw_ms" and "ratio".

    Left: milliseconds per step, one colour a batch size, solid for Tritwise and dashed for the same model in float
    under AdamW. Right: Tritwise ÷ AdamW, with the line at 1.5 that no step may cross.
    """
    with look():
        figure, (left, right) = new_figure(3.7, columns=2)
        batches = sorted({row["batch"] for row in rows})
        ends: list[tuple[float, float]] = []
        for batch, colour in zip(batches, sequence_colours(len(batches)), strict=True):
            own = sorted((row for row in rows if row["batch"] == batch), key=lambda row: row["width"])
            widths = [row["width"] for row in own]
            style: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 4, "markeredgecolor": PAPER}
            left.plot(widths, [row["tritwise_ms"] for row in own], **style)
            left.plot(widths, [row["adamw_ms"] for row in own], **style, linestyle=(0, (3, 2)), alpha=0.75)
            right.plot(widths, [row["ratio"] for row in own], **style, label=f"batch {tick(batch)}")
            ends.append((widths[-1], own[-1]["ratio"]))
        left.plot([], [], color=INK, label="Tritwise")
        left.plot([], [], color=INK, linestyle=(0, (3, 2)), alpha=0.75, label="float, AdamW")
        left.set_yscale("log")
        left.set_yticks([], minor=True)
        left.set_title("Time per step, ms")
        left.yaxis.set_major_formatter(lambda value, _: tick(value))
        left.legend(loc="upper left")
        right.axhline(1.5, color=VERMILION, linewidth=1.2, linestyle=(0, (5, 3)))
        right.annotate(
            "limit 1.5×",
            (1, 1.5),
            (0, 4),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            color=VERMILION,
            fontsize=8.5,
        )
        right.axhline(1.0, color=FAINT, linewidth=1, zorder=1)
        right.set_title("Time of Tritwise ÷ time of AdamW")
        right.set_ylim(0, max(1.75, 1.1 * max((row["ratio"] for row in rows), default=0)))
        right.yaxis.set_major_formatter(lambda value, _: f"{tick(value)}×")
        if rows:
            right.legend(loc="lower right", ncols=2 if len(batches) > 3 else 1)
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted({row["width"] for row in rows}), minor=False)
            axes.set_xticks([], minor=True)
            axes.xaxis.set_major_formatter(lambda value, _: tick(value))
            axes.set_xlabel("width")
    return figure


def running_mean(values: Sequence[float], reach: int) -> list[float]:
    """The mean of each value and up to `reach` neighbours on either side.

    At the start as many on the right as there are on the left, or the mean would lag behind a steep fall; at the end
    fewer on the right only, so that it does not wobble there.
    """
    totals = [0.0]
    for value in values:
        totals.append(totals[-1] + value)
    means = []
    for index in range(len(values)):
        left = min(reach, index)
        right = min(left, len(values) - 1 - index)
        means.append((totals[index + right + 1] - totals[index - left]) / (left + right + 1))
    return means


def thin(xs: Sequence[float], ys: Sequence[float], most: int = 2000) -> Line:
    """Every n-th point, about `most` in all and the last among them: a long run draws as fast as a short one."""
    stride = -(-len(xs) // most) or 1
    keep = [*range(0, len(xs) - 1, stride), *range(len(xs))[-1:]]
    return [xs[index] for index in keep], [ys[index] for index in keep]


def bytes_axis(axes: Axes) -> None:
    """Make the horizontal axis count bytes."""
    axes.xaxis.set_major_formatter(lambda value, _: tick_bytes(value))
    axes.set_xlabel("bytes seen in training")
    axes.margins(x=0.02)


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers in [low, high] for a logarithmic axis: the finest set whose neighbours are far enough apart."""
    ticks: list[float] = []
    for digits in _TICK_DIGITS:
        ticks = [
            digit * 10.0**power for power in range(-12, 10) for digit in digits if low <= digit * 10.0**power <= high
        ]
        if all(math.log(b / a) > 0.07 * math.log(high / low) for a, b in itertools.pairwise(ticks)):
            break
    return ticks


def _dot(line: Line) -> dict[str, Any]:
    """A line of one point needs a marker to be seen."""
    return {"marker": "o", "markersize": 4.5} if len(line[0]) == 1 else {}


def _ladder_lines(axes: Axes, ladder: Sequence[tuple[str, float]], low: float, high: float) -> None:
    """Horizontal lines, each with its name on it at the right, the names moved apart where two lines are close."""
    heights = [math.log(nats / low) / math.log(high / low) for _, nats in ladder]
    for (name, nats), height in zip(ladder, spread(heights, 0.034), strict=True):
        strong = name == "5-gram"
        axes.axhline(
            nats, color=INK if strong else MUTED, linewidth=1.1 if strong else 0.8, linestyle=(0, (4, 3)), zorder=1.5
        )
        axes.text(
            0.995,
            height + 0.003,
            f"{name} {nats:.3f}",
            transform=axes.transAxes,
            ha="right",
            va="bottom",
            fontsize=7.5,
            color=INK if strong else MUTED,
            fontweight="bold" if strong else "normal",
        )
