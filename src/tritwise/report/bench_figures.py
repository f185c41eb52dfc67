"""Plots of rules beside each other: loss, bytes of training state, rates, activity.

Entries of `bench_tables.summary` in, a matplotlib Figure out; `default` is the variant to set in bold. Colour and
marker say what kind of state a rule keeps, names stand beside the points. Where a few rules are far worse than the
rest, the axis ends above the rest and the few are marked at its top, or the differences that matter would vanish.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from tritwise.report.bench_labels import Label, end_labels, point_labels, shorten
from tritwise.report.bench_rows import Variant
from tritwise.report.bench_tables import Summary
from tritwise.report.curves import Line, bytes_axis, log_ticks, running_mean, thin
from tritwise.report.figures import BLUE, FAINT, GREEN, INK, MUTED, PAPER, VERMILION, look, new_figure
from tritwise.report.numbers import number, percent, tick

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.5, 1.5)))
RATE_COLUMNS, RATE_REACH = 4, 0.15  # panels side by side; bpb above a rule's best that a panel shows
PANEL_LETTERS = 18  # of a name over a panel, before it is set smaller


@dataclass(frozen=True)
class Kind:
    """What kind of state a rule keeps, and how such rules are drawn."""

    name: str
    colour: str
    marker: str


OURS = Kind("ours", BLUE, "o")
INTEGER = Kind("other rules without float state", GREEN, "s")
LATENT = Kind("ternary weights, float state", VERMILION, "D")
FLOAT = Kind("float weights", INK, "^")
KINDS = (OURS, INTEGER, LATENT, FLOAT)


def kind_of(entry: Summary) -> Kind:
    """By what the row says of its state: bytes of floats, and whether its weights have zeros to count."""
    if entry.own:
        return OURS
    if entry.float_state_bytes == 0:
        return INTEGER
    return FLOAT if entry.zero_fraction is None else LATENT


def curve_of(entry: Summary) -> Line:
    """(bytes seen, running mean of training loss in nats) of the first finished run; empty if it has no curve."""
    points = entry.runs[0].row.get("curve") if entry.runs else None
    pairs = [(number(p[0]), number(p[1])) for p in points if isinstance(p, list) and len(p) == 2] if points else []
    kept = [(x, y) for x, y in pairs if x is not None and y is not None and y > 0]
    return [x for x, _ in kept], running_mean([y for _, y in kept], len(kept) // 30)


def rules_loss_figure(
    entries: Sequence[Summary], ladder: Sequence[tuple[str, float]], default: Variant | None = None
) -> Figure:
    """Training loss against bytes seen, a line a rule; left all of it with the ladder, right the last half from near.

    Each rule is named once: at the right if its end is in that panel, else at the left among the ladder's names.
    """
    lines = [(entry, curve_of(entry)) for entry in entries if curve_of(entry)[0]]
    ends = [line[1][-1] for _, line in lines]
    shown = _ceiling(ends)
    with look():
        figure, (left, right) = new_figure(4.9, columns=2, width_ratios=[1, 1.15])
        seen: dict[Kind, int] = {}
        for entry, line in lines:
            kind = kind_of(entry)
            dash = DASHES[seen.get(kind, 0) % len(DASHES)]
            seen[kind] = seen.get(kind, 0) + 1
            style = {"color": kind.colour, "linestyle": dash, "linewidth": 2.2 if entry.variant == default else 1.2}
            for axes in (left, right):
                axes.plot(*thin(*line), **style, zorder=3 if entry.own else 2)
        last = max(line[0][-1] for _, line in lines)
        values = [*ends, *(nats for _, nats in ladder), *(max(line[1]) for _, line in lines)]
        _log_axis(left, min(values) / 1.05, min(max(values), 2 * max(ends + [n for _, n in ladder])) * 1.05)
        near = [y for _, (xs, ys) in lines for x, y in zip(xs, ys, strict=True) if x >= last / 2 and y <= shown]
        margin = 0.06 * ((max(near) - min(near)) or 0.1)
        _linear_axis(right, min(near) - margin, max(near) + margin)
        left.set_title("Training loss, nats per byte, log scale")
        right.set_title("The last half, nats per byte")
        for axes, start in ((left, 0.0), (right, last / 2)):
            bytes_axis(axes)
            axes.set_xlim(start, last)
        rungs = []
        for name, nats in ladder:
            strong = name == "5-gram"
            colour = INK if strong else MUTED
            left.plot([0, last], [nats, nats], color=colour, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1.5)
            rungs.append(Label(f"{name} {nats:.3f}", last, nats, colour, strong))
        names = [Label(e.label, xs[-1], ys[-1], kind_of(e).colour, e.variant == default) for e, (xs, ys) in lines]
        low, high = right.get_ylim()
        _kinds_legend(figure, [entry for entry, _ in lines], lines_only=True)
        end_labels(left, [*rungs, *(label for label in names if label.y > shown)])
        end_labels(right, [label for label in names if low <= label.y <= high and label.y <= shown])
        for axes, start in ((left, 0.0), (right, last / 2)):
            axes.set_xticks([place for place in axes.get_xticks() if start <= place <= 1.001 * last])
    return figure


def state_figure(entries: Sequence[Summary], default: Variant | None = None) -> Figure:
    """Val bpb against bytes of training state per weight (log), a point a rule; bars reach from seed to seed."""
    points = [entry for entry in entries if entry.mean is not None and (entry.bytes_per_weight or 0) > 0]
    shown = _ceiling([entry.mean or 0 for entry in points])
    with look():
        figure, (axes,) = new_figure(4.8)
        ends = [score for entry in points for score in entry.best.scores.values() if (entry.mean or 0) <= shown]
        reach = (max(ends) - min(ends)) or 0.1
        above = [entry for entry in points if (entry.mean or 0) > shown]
        _linear_axis(axes, min(ends) - 0.08 * reach, max(ends) + (0.22 if above else 0.08) * reach)
        top = axes.get_ylim()[1]
        sizes = [entry.bytes_per_weight or 1 for entry in points]
        axes.set_xscale("log", base=2)
        axes.set_xlim(min(sizes) / 1.35, max(sizes) * 1.75)
        axes.set_xticks(_byte_ticks(min(sizes), max(sizes)), minor=False)
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter(lambda value, _: f"{tick(value)} B")
        axes.set_xlabel("weights and optimizer between steps, bytes per weight, log scale")
        axes.set_title("Validation, bits per byte")
        axes.grid(axis="x")
        names = []
        obstacles = []
        for entry in points:
            kind, x, y = kind_of(entry), entry.bytes_per_weight or 1, entry.mean or 0
            scores = entry.best.scores.values()
            if entry in above:
                axes.plot(x, top, marker="^", markersize=5, color=kind.colour, clip_on=False, zorder=3)
                names.append(
                    Label(f"{entry.label} {y:.2f}", x, top - 0.02 * reach, kind.colour, entry.variant == default)
                )
                continue
            axes.errorbar(
                x,
                y,
                [[y - min(scores)], [max(scores) - y]],
                color=kind.colour,
                marker=kind.marker,
                markersize=8.5 if entry.variant == default else 7,
                markeredgecolor=PAPER,
                markeredgewidth=0.5,
                elinewidth=1.2,
                capsize=4 if len(scores) > 1 else 0,
                zorder=4 if entry.own else 3,
            )
            obstacles += [(x, min(scores)), (x, max(scores))] if len(scores) > 1 else []
            names.append(Label(f"{entry.label} {y:.3f}", x, y, kind.colour, entry.variant == default))
        own = [entry.mean or 0 for entry in points if entry.own]
        if own and min(own) <= shown:
            axes.axhline(min(own), color=BLUE, linewidth=0.9, linestyle=(0, (4, 3)), alpha=0.6, zorder=1.4)
        _kinds_legend(figure, points)
        point_labels(axes, names, obstacles)
    return figure


def rates_figure(entries: Sequence[Summary]) -> Figure:
    """Val bpb above the rule's best against rate (log), a panel a rule: dots are runs, the ring is the best rate.

    One vertical axis for all, so that a flat curve is a rule that forgives its rate; the best itself is written above
    it. A run that diverged, or lies above the axis, is a cross at the top.
    """
    tuned = [e for e in entries if sum(one.rate is not None and one.rate > 0 for one in e.tried) > 1]
    with look():
        columns = min(RATE_COLUMNS, len(tuned))
        rows = -(-len(tuned) // columns)
        figure, cells = new_figure(0.75 + 1.45 * rows, rows, columns, sharey=True)
        for axes in cells[len(tuned) :]:
            axes.set_visible(False)
        for axes, entry in zip(cells, tuned, strict=False):
            _rate_panel(axes, entry, kind_of(entry).colour)
        for row in range(rows):
            cells[row * columns].set_ylabel("bpb above best", fontsize=8)
        for axes in cells[max(0, len(tuned) - columns) : len(tuned)]:
            axes.set_xlabel("rate, log scale", fontsize=8)
    return figure


def activity_figure(entries: Sequence[Summary]) -> Figure:
    """Bars of zeros, of flips a step and of flips undone, for every rule that records one of them."""
    columns = (
        ("zero_fraction", "Zeros"),
        ("flip_rate", "Flips per step"),
        ("flip_back", "Flips undone in 100 steps"),
    )
    active = [entry for entry in entries if any(getattr(entry, key) is not None for key, _ in columns)]
    with look():
        figure, cells = new_figure(0.75 + 0.25 * len(active), columns=3, sharey=True)
        places = range(len(active))
        for axes, (key, title) in zip(cells, columns, strict=True):
            values = [getattr(entry, key) for entry in active]
            axes.barh(places, [value or 0 for value in values], 0.62, color=[kind_of(e).colour for e in active])
            for place, value in zip(places, values, strict=True):
                told = "not recorded" if value is None else percent(value, 2 if key == "flip_rate" else 3)
                axes.annotate(
                    told,
                    (value or 0, place),
                    (4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7.8,
                    color=FAINT if value is None else INK,
                )
            axes.set_title(title, fontsize=9)
            axes.set_xlim(0, 1.45 * max([*(value or 0 for value in values), 1e-9]))
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)
            axes.grid(False)
        cells[0].set_yticks(places, [shorten(entry.label) for entry in active])
        cells[0].set_ylim(len(active) - 0.45, -0.55)
        for label, entry in zip(cells[0].get_yticklabels(), active, strict=True):
            label.set(color=kind_of(entry).colour, fontweight="bold" if entry.own else "normal", fontsize=8.5)
    return figure


def _rate_panel(axes: Axes, entry: Summary, colour: str) -> None:
    tried = [one for one in entry.tried if one.rate is not None and one.rate > 0]
    rates = [one.rate or 1 for one in tried]
    axes.set_xscale("log")
    axes.set_xlim(min(rates) / 1.6, max(rates) * 1.6)
    axes.set_xticks(_rate_ticks(rates, entry.best.rate or rates[0]), minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(labelsize=7.5)
    axes.set_ylim(-0.12 * RATE_REACH, RATE_REACH)
    axes.set_yticks([0, RATE_REACH / 3, 2 * RATE_REACH / 3, RATE_REACH])
    axes.yaxis.set_major_formatter(lambda value, _: f"+{value:.2f}" if value else "0")
    long = len(entry.label) > PANEL_LETTERS
    title = f"{entry.label[: PANEL_LETTERS + 3]}…" if len(entry.label) > PANEL_LETTERS + 4 else entry.label
    axes.set_title(title, fontsize=6.8 if long else 8, pad=6, color=colour)
    if entry.mean is None:
        axes.text(0.5, 0.5, "every run diverged", transform=axes.transAxes, ha="center", fontsize=7.5, color=MUTED)
        axes.plot(rates, [RATE_REACH] * len(rates), color=MUTED, marker="x", linestyle="", clip_on=False)
        return
    best = entry.mean
    means = [one.mean - best if one.mean is not None else float("nan") for one in tried]
    axes.plot(rates, means, color=colour, linewidth=1.3)
    for rate, one in zip(rates, tried, strict=True):
        inside = [score - best for score in one.scores.values() if score - best <= RATE_REACH]
        axes.plot([rate] * len(inside), inside, color=colour, marker="o", markersize=3, linestyle="", alpha=0.55)
        if one.diverged or len(inside) < len(one.scores):
            axes.plot(rate, RATE_REACH, color=MUTED, marker="x", markersize=5, clip_on=False)
    axes.plot(entry.best.rate or 1, 0, marker="o", markersize=9, markerfacecolor="none", markeredgecolor=colour)
    axes.set_title(f"{best:.3f}", loc="right", fontsize=8, pad=6, fontweight="normal")
    if entry.edge:
        left = entry.edge == "lowest"  # where the curve is low
        place, side = (0.04, "left") if left else (0.96, "right")
        told = f"{entry.edge} tried"
        axes.text(place, 0.75, told, transform=axes.transAxes, ha=side, fontsize=7.5, color=VERMILION)


def _rate_ticks(rates: Sequence[float], best: float) -> list[float]:
    """The best rate, and the lowest and the highest if their numbers find room beside it."""
    span = math.log(1.6 * max(rates) / (min(rates) / 1.6))
    return [best, *(end for end in (min(rates), max(rates)) if abs(math.log(end / best)) > 0.24 * span)]


def _ceiling(values: Sequence[float]) -> float:
    """Up to which value an axis is worth its room: the best and the usual, not the few that are far off."""
    if not values:
        return 0.0
    best, usual = min(values), median(values)
    limit = best + max(0.25 * best, 2.5 * (usual - best))
    return max(value for value in values if value <= limit)


def _byte_ticks(low: float, high: float) -> list[float]:
    return [size for size in (0.5, 1, 2, 4, 8, 12, 16, 24, 32) if low / 1.35 <= size <= 1.75 * high]


def _linear_axis(axes: Axes, low: float, high: float) -> None:
    axes.set_ylim(low, high)
    axes.yaxis.set_major_formatter(lambda value, _: tick(round(value, 6)))


def _log_axis(axes: Axes, low: float, high: float) -> None:
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.set_yticks(log_ticks(low, high), minor=False)
    axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _: tick(value))


def _kinds_legend(figure: Figure, entries: Sequence[Summary], lines_only: bool = False) -> None:
    """What the colours and markers mean, in one line above the panels."""
    from matplotlib.lines import Line2D

    there = [kind for kind in KINDS if any(kind_of(entry) is kind for entry in entries)]
    handles = [
        Line2D([], [], color=k.colour, linewidth=1.8, marker=None if lines_only else k.marker, markersize=5.5)
        for k in there
    ]
    if not lines_only:
        for handle in handles:
            handle.set_linestyle("")
    figure.legend(handles, [kind.name for kind in there], loc="outside upper center", ncols=len(there))
