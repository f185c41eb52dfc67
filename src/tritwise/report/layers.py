"""The plot of every layer against bytes: flips and zeros, readable for two blocks and for forty.

Plain lists and dicts in, a matplotlib Figure out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from tritwise.report.curves import Line, bytes_axis, log_ticks, thin
from tritwise.report.figures import INK, MUTED, look, new_figure, sequence_colours
from tritwise.report.numbers import tick_percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEGEND_LAYERS = 12  # up to so many layers each has a colour and a name; beyond, a colour stands for a block
LEGEND_ROWS = 24


def layers_figure(flip_rate: Mapping[str, Line], zero_fraction: Mapping[str, Line]) -> Figure:
    """Two panels against bytes, a line a layer: the share of leading trits that flip in a step (log), and that is zero.

    Up to `LEGEND_LAYERS` layers are coloured and named one by one. Beyond that, layers whose names begin alike up to
    the first number (`blocks.0.…`) share a colour, dark for the first block to light for the last, under a bold line
    for their median.
    """
    with look():
        figure, (top, bottom) = new_figure(6.0, rows=2, sharex=True)
        names = list(dict.fromkeys([*flip_rate, *zero_fraction]))
        styles = _layer_styles(names)
        handles: dict[str, Any] = {}
        for axes, lines in ((top, flip_rate), (bottom, zero_fraction)):
            for label, members, style in styles:
                _draw_group(axes, [lines[name] for name in members if name in lines], style)
                if label not in handles:
                    handles[label] = axes.plot([], [], **style)[0]
        flips = [value for _, ys in flip_rate.values() for value in ys if value > 0]
        if flips:
            top.set_yscale("log", nonpositive="mask")
            if max(flips) < 30 * min(flips):
                top.set_yticks(log_ticks(min(flips) / 1.1, max(flips) * 1.1))
            top.set_yticks([], minor=True)
        for axes, lines, title in (
            (top, flip_rate, "Flips per step, share of a layer’s weights"),
            (bottom, zero_fraction, "Zeros, share of a layer’s weights"),
        ):
            axes.yaxis.set_major_formatter(lambda value, _: tick_percent(value))
            axes.set_title(title)
            if not lines:
                axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=MUTED)
        bytes_axis(bottom)
        # A deep model's legend names every second block, or third, and always the last layer.
        labels = list(handles)
        labels = [*labels[: -1 : -(-len(labels) // LEGEND_ROWS) or 1], *labels[-1:]]
        picked = [handles[label] for label in labels]
        figure.legend(picked, labels, loc="outside right upper", title="Layers", alignment="left")
    return figure


def _layer_styles(names: Sequence[str]) -> list[tuple[str, list[str], dict[str, Any]]]:
    """(label, layers, line style) for each group of layers that shares a colour, in the order of the model."""
    if len(names) <= LEGEND_LAYERS:
        colours = sequence_colours(len(names))
        return [(name, [name], {"color": colour}) for name, colour in zip(names, colours, strict=True)]
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_block(name) or name, []).append(name)
    blocks = [label for label in groups if _block(label)]
    colours = dict(zip(blocks, sequence_colours(len(blocks)), strict=True))
    dashes: Iterable[Any] = [(0, (4, 1.5)), (0, (1, 1.2)), (0, (4, 1.5, 1, 1.5))]
    others = [label for label in groups if label not in colours]
    styles = {
        label: {"color": INK, "linestyle": dash}
        for label, dash in zip(others, list(dashes) * len(others), strict=False)
    }
    return [
        (_count(label, members), members, styles.get(label) or {"color": colours[label]})
        for label, members in groups.items()
    ]


def _block(name: str) -> str | None:
    """The name up to and including its first number, which is the depth it sits at: blocks.3.mlp.up -> blocks.3."""
    found = re.match(r"(?:[^.]*\.)*?\d+(?=\.|$)", name)
    return found.group() if found else None


def _count(label: str, members: Sequence[str]) -> str:
    return f"{label} · {len(members)} layers" if len(members) > 1 else label


def _draw_group(axes: Axes, lines: Sequence[Line], style: Mapping[str, Any]) -> None:
    if len(lines) == 1:
        axes.plot(*thin(*lines[0]), **style)
        return
    by_x: dict[float, list[float]] = {}
    for xs, ys in lines:
        axes.plot(*thin(xs, ys), **{**style, "linewidth": 0.7, "alpha": 0.3})
        for x, y in zip(xs, ys, strict=True):
            by_x.setdefault(x, []).append(y)
    middle = sorted(by_x)
    axes.plot(*thin(middle, [median(by_x[x]) for x in middle]), **style)
