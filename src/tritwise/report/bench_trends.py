"""What changes with size: the gap to AdamW against weights, and the cost of not retuning against batch and width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

from tritwise.report.bench_labels import Label, end_labels
from tritwise.report.bench_rows import Cell, Variant
from tritwise.report.bench_tables import Summary
from tritwise.report.figures import BLUE, FAINT, INK, PAPER, VERMILION, look, new_figure, sequence_colours
from tritwise.report.numbers import human_bytes, tick

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RIVAL = "adamw"
BAND = 0.02  # bpb that a rate may cost where it was not tuned


@dataclass(frozen=True)
class Gap:
    """Own rule minus AdamW, each at its best rate, in one cell; one value a seed that both have, else one of means."""

    weights: float
    gaps: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean gap in bits per byte; negative where the own rule is ahead."""
        return fmean(self.gaps)


@dataclass(frozen=True)
class Trend:
    """Gaps over sizes at one length of training, smallest model first, and the line through them."""

    length: float
    points: tuple[Gap, ...]
    slope: float  # bits per byte for every tenfold of weights
    at_10m: float  # of the line at 10,000,000 weights

    @property
    def caption(self) -> str:
        """The line in words."""
        signed = [f"{value:+.4f}".replace("-", "−") for value in (self.at_10m, self.slope)]
        return (
            f"{human_bytes(self.length)}: {signed[0]} at 10M weights, {signed[1]} for every tenfold of weights "
            f"({len(self.points)} sizes)"
        )


@dataclass(frozen=True)
class Excess:
    """The cost of not retuning at one batch or width: val bpb at the default rate minus that of the best rate."""

    size: float
    bpb: float
    rates: int  # how many were tried there
    edge: bool  # the best of them is the lowest or highest


def least_squares(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """(slope, value at x = 0) of the line with the least squared vertical distances; the xs must not all be equal."""
    x, y = fmean(xs), fmean(ys)
    slope = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)
    return slope, y - slope * x


def trends(summaries: Sequence[Summary], default: Variant | None) -> list[Trend]:
    """Gap of `default` to AdamW over sizes, for each text and length that has two sizes or more, shortest first."""
    pairs: dict[Cell, dict[str, Summary]] = {}
    for entry in summaries:
        if entry.mean is None:
            continue
        if entry.variant == default:
            pairs.setdefault(entry.cell, {})["own"] = entry
        elif entry.variant.rule == RIVAL:
            pairs.setdefault(entry.cell, {}).setdefault(RIVAL, entry)  # the best of its variants comes first
    lines: dict[Cell, list[Gap]] = {}
    for cell, pair in pairs.items():
        weights = pair["own"].weights if len(pair) == 2 else None
        if weights and cell.length:
            gaps = _gaps(pair["own"], pair[RIVAL])
            lines.setdefault(replace(cell, width=None, depth=None, setup=""), []).append(Gap(weights, gaps))
    made = []
    for cell, points in lines.items():
        points.sort(key=lambda point: point.weights)
        if points[0].weights < points[-1].weights:
            xs, ys = [math.log10(point.weights / 1e7) for point in points], [point.mean for point in points]
            made.append(Trend(cell.length or 0, tuple(points), *least_squares(xs, ys)))
    return sorted(made, key=lambda trend: trend.length)


def robustness(
    summaries: Sequence[Summary], default: Variant | None, home: Cell | None, rate: float | None
) -> dict[str, list[Excess]]:
    """ "batch" and "width" -> the cost of keeping `rate` there, by size, for what was tuned with two rates or more.

    A cell counts if it is like `home` in all but the batch (and the steps, which may keep the steps or the bytes), or
    in all but the width (and the depth, if there is none of that width with the same). The rest of the set-up may
    differ where it has to: more heads in a wider model.
    """
    found: dict[str, list[Excess]] = {"batch": [], "width": []}
    entries = [entry for entry in summaries if entry.variant == default and entry.mean is not None]
    if home is None or rate is None:
        return {}
    for what, free in (("batch", "steps"), ("width", "depth")):
        sizes: dict[float, list[tuple[tuple[bool, bool], Excess]]] = {}
        for entry in entries:
            size, excess = getattr(entry.cell, what), _excess(entry, rate)
            other = {what: None, free: None, "setup": ""}
            alike = replace(entry.cell, **other) == replace(home, **other)
            same = getattr(entry.cell, free) == getattr(home, free)
            allowed = same or what == "width" or entry.cell.length == home.length
            if size is not None and excess is not None and alike and allowed:
                cost = Excess(size, excess, len(entry.tried), entry.edge in ("lowest", "highest"))
                sizes.setdefault(size, []).append(((not same, entry.cell.setup != home.setup), cost))
        found[what] = [min(costs, key=lambda pair: pair[0])[1] for _, costs in sorted(sizes.items())]
    return {what: points for what, points in found.items() if len(points) > 1}


def scaling_figure(lines: Sequence[Trend]) -> Figure:
    """Gap to AdamW in bits per byte against weights (log), a colour a length; bars from seed to seed, dashed trends."""
    with look():
        figure, (axes,) = new_figure(3.9)
        colours = sequence_colours(max(3, len(lines)))
        sizes = [point.weights for line in lines for point in line.points]
        gaps = [gap for line in lines for point in line.points for gap in point.gaps]
        reach = (max([*gaps, 0]) - min([*gaps, 0])) or 0.01
        axes.set_ylim(min([*gaps, 0]) - 0.14 * reach, max([*gaps, 0]) + 0.14 * reach)
        axes.set_xscale("log")
        axes.set_xlim(min(sizes) / 1.2, max(sizes) * 1.04)
        axes.plot(axes.get_xlim(), [0, 0], color=INK, linewidth=1)
        names = [Label("AdamW", max(sizes) * 1.04, 0, INK)]
        for index, (line, colour) in enumerate(zip(lines, colours, strict=False)):
            aside = 1.025 ** (2 * index - len(lines) + 1)  # bars at the same size stand beside each other
            ys = [point.mean for point in line.points]
            low = [point.mean - min(point.gaps) for point in line.points]
            high = [max(point.gaps) - point.mean for point in line.points]
            style = {"color": colour, "marker": "o", "markersize": 6.5, "markeredgecolor": PAPER, "linestyle": ""}
            xs = [point.weights * aside for point in line.points]
            axes.errorbar(xs, ys, [low, high], **style, elinewidth=1.2, capsize=3, zorder=3)
            ends = [line.points[0].weights, line.points[-1].weights]
            fitted = [line.at_10m + line.slope * math.log10(x / 1e7) for x in ends]
            axes.plot(ends, fitted, color=colour, linewidth=1.3, linestyle=(0, (5, 2)))
            told = f"{human_bytes(line.length)} of text, {_signed(line.slope, 3)} per ×10"
            names.append(Label(told, ends[-1], fitted[-1], colour))
        axes.set_xticks(sorted(set(sizes)), minor=False)
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:.3g}M")
        axes.yaxis.set_major_formatter(lambda value, _: _signed(value))
        axes.set_xlabel("weights, log scale")
        axes.set_title("Ours − AdamW, bits per byte of validation text (below 0: ours is ahead)")
        end_labels(axes, names)
    return figure


def robustness_figure(costs: dict[str, list[Excess]]) -> Figure:
    """Val bpb at the default rate minus that of the tuned rate, against batch and against width; the band is ±0.02.

    Hollow: the tuned rate is the lowest or highest that was tried there, so a better one may exist.
    """
    units = {"batch": "batch, sequences, log scale", "width": "width, log scale"}
    with look():
        figure, cells = new_figure(3.3, columns=max(1, len(costs)), sharey=True)
        for axes, (what, points) in zip(cells, costs.items(), strict=False):
            axes.axhspan(-BAND, BAND, color=BLUE, alpha=0.08, linewidth=0)
            axes.axhline(0, color=FAINT, linewidth=1)
            axes.plot([p.size for p in points], [p.bpb for p in points], color=BLUE, linewidth=1.4)
            for point in points:
                colour = BLUE if point.bpb <= BAND else VERMILION
                fill = PAPER if point.edge else colour
                axes.plot(point.size, point.bpb, marker="o", markersize=6.5, color=colour, markerfacecolor=fill)
                axes.annotate(
                    _signed(point.bpb, 3),
                    (point.size, point.bpb),
                    (0, 8),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8.5,
                    color=colour,
                )
            _size_axis(axes, [point.size for point in points], units[what])
            axes.set_title(f"Against {what}")
            axes.annotate(
                "band of ±0.02",
                (0.01, -BAND),
                (0, 3),
                xycoords=axes.get_yaxis_transform(),
                textcoords="offset points",
                fontsize=8,
                color=BLUE,
            )
        highest = max([point.bpb for points in costs.values() for point in points] + [BAND])
        cells[0].set_ylim(-1.35 * BAND, 1.2 * highest + 0.006)
        cells[0].yaxis.set_major_formatter(lambda value, _: _signed(value))
        cells[0].set_ylabel("bits per byte lost by not retuning")
    return figure


def _gaps(own: Summary, rival: Summary) -> tuple[float, ...]:
    ours, theirs = own.best.scores, rival.best.scores
    shared = tuple(score - theirs[seed] for seed, score in ours.items() if seed in theirs)
    return shared or (fmean(ours.values()) - fmean(theirs.values()),)


def _excess(entry: Summary, rate: float) -> float | None:
    """Mean val bpb at `rate` minus that of the best rate; None if `rate` was not tried, or nothing else was.

    Over the seeds that both have, if there are any, so that a lucky seed at one of them is no difference.
    """
    kept = next((one for one in entry.tried if one.rate == rate and one.scores), None)
    if kept is None or len(entry.tried) < 2:
        return None
    shared = kept.scores.keys() & entry.best.scores.keys()
    means = [
        fmean(score for seed, score in one.scores.items() if not shared or seed in shared) for one in (kept, entry.best)
    ]
    return means[0] - means[1]


def _signed(value: float, digits: int | None = None) -> str:
    """+0.012, −0.012, 0; on an axis with as few digits as it needs."""
    text = tick(round(abs(value), 6)) if digits is None else f"{abs(value):.{digits}f}"
    sign = "" if float(text.replace(",", "")) == 0 else "+" if value > 0 else "−"
    return sign + text


def _size_axis(axes: Axes, sizes: Sequence[float], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(sizes) / 1.35, max(sizes) * 1.35)
    axes.set_xticks(sorted(sizes), minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda value, _: tick(value))
    axes.set_xlabel(label)
