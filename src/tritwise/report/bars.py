"""Plots of how much: the histogram of registers, and the memory that training holds.

Plain lists and dicts in, a matplotlib Figure out. A register R in [−121, 121] has the leading trit −1 below −40, +1
above 40 and 0 between, so a histogram has 243 bins and two boundaries, at ±40.5.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tritwise.report.figures import BLUE, FAINT, GRID, INK, MUTED, PAPER, TRIT_COLOURS, look, new_figure
from tritwise.report.numbers import human_bytes, percent, tick, tick_percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REGISTERS = range(-121, 122)
PARTS = ((-1, -121, -40), (0, -40, 41), (1, 41, 122))  # leading trit, first register, one past the last
ADAMW_BYTES = (("fp32 AdamW", 12), ("with gradients", 16))  # weight, two moments; and a gradient: four bytes each
_TRIT_NAMES = {-1: "−1", 0: "0", 1: "+1"}


def histogram_figure(counts: Sequence[float]) -> Figure:
    """The share of registers that hold each of −121…121, coloured by the leading trit. `counts` has 243 entries."""
    with look():
        figure, (axes,) = new_figure(3.4)
        shares = _shares(counts)
        ceiling = _fill(axes, shares)
        axes.set_ylim(0, 1.18 * ceiling)
        for boundary in (-40.5, 40.5):
            axes.axvline(boundary, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        for trit, first, end in PARTS:
            share = sum(shares[first + 121 : end + 121])
            axes.text(
                (first + end - 1) / 2,
                1.15 * ceiling,
                f"{_TRIT_NAMES[trit]}   {percent(share)}",
                ha="center",
                va="top",
                fontweight="bold",
                bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 2},
                color=INK if trit == 0 else TRIT_COLOURS[trit],
            )
        for register, share in zip(REGISTERS, shares, strict=True):
            if share > ceiling:  # a spike cut off so that the rest stays visible says how high it is
                axes.annotate(
                    percent(share),
                    (register, ceiling),
                    (-4 if register > 0 else 4, 0),
                    textcoords="offset points",
                    ha="right" if register > 0 else "left",
                    va="top",
                    fontsize=8,
                    color=MUTED,
                )
        axes.yaxis.set_major_formatter(lambda value, _: tick_percent(value))
        axes.set_xticks([-121, -81, -41, 0, 41, 81, 121])
        _register_axis(axes)
    return figure


def histogram_grid_figure(layers: Mapping[str, Sequence[float]], columns: int = 3) -> Figure:
    """`histogram_figure` in small for each kind of layer: layers whose names differ only in numbers are added up."""
    kinds: dict[str, list[float]] = {}
    for name, counts in layers.items():
        total = kinds.setdefault(layer_kind(name), [0.0] * len(REGISTERS))
        total[:] = [a + b for a, b in zip(total, counts, strict=True)]
    with look():
        rows = max(1, -(-len(kinds) // columns))
        figure, cells = new_figure(0.35 + 1.45 * rows, rows, columns, sharex=True)
        for axes in cells[len(kinds) :]:
            axes.set_visible(False)
        for axes, (kind, counts) in zip(cells, kinds.items(), strict=False):
            shares = _shares(counts)
            axes.set_ylim(0, 1.05 * _fill(axes, shares))
            axes.set_yticks([])
            axes.set_title(kind if len(kind) <= 26 else f"…{kind[-25:]}", fontsize=8, pad=6)
            zeros = percent(sum(shares[81:162]), 2)
            axes.set_title(f"{zeros} zero", loc="right", fontsize=7.5, fontweight="normal", color=MUTED, pad=6)
            for boundary in (-40.5, 40.5):
                axes.axvline(boundary, color=INK, linewidth=0.6, linestyle=(0, (4, 3)))
            axes.set_xticks([-121, -41, 41, 121])
            axes.xaxis.set_major_formatter(lambda value, _: tick(value).replace("-", "−"))
            axes.tick_params(labelbottom=True)
    return figure


def memory_figure(bytes_by_role: Mapping[str, float], weights: float) -> Figure:
    """Bytes that training holds, by role of the tensor, above what fp32 AdamW would hold for as many weights.

    The bars for AdamW are computed, not measured: 12 bytes a weight (weight and two moments), 16 with its gradient.
    """
    with look():
        roles = sorted(bytes_by_role.items(), key=lambda item: -item[1])
        total = sum(bytes_by_role.values())
        figure, (top, bottom) = new_figure(1.9 + 0.3 * len(roles), rows=2, height_ratios=[max(1, len(roles)), 3.4])
        _bars(top, [role for role, _ in roles], [size for _, size in roles], [BLUE] * len(roles))
        top.set_title("This run, by role")
        names = ["this run, all of it", *(f"{name}, computed" for name, _ in ADAMW_BYTES)]
        sizes = [total, *(each * weights for _, each in ADAMW_BYTES)]
        notes = ["", *(f"{size / total:.1f}× as much" if total else "" for size in sizes[1:])]
        _bars(bottom, names, sizes, [BLUE, GRID, GRID], notes)
        for patch in bottom.patches[1:]:
            patch.set(edgecolor=FAINT, hatch="////")
        bottom.set_title("Beside float training of the same weights")
    return figure


def layer_kind(name: str) -> str:
    """A layer's name with every number replaced: blocks.3.mlp.up -> blocks.*.mlp.up."""
    return re.sub(r"(?:(?<=\.)|^)\d+(?=\.|$)", "*", name)


def _shares(counts: Sequence[float]) -> list[float]:
    total = sum(counts)
    return [value / total if total else 0.0 for value in counts]


def _fill(axes: Axes, shares: Sequence[float]) -> float:
    """Draw the three coloured parts. Returns the height to show: all, unless a few spikes would hide the rest."""
    ordered = sorted(shares)
    usual = ordered[int(0.97 * len(ordered))]
    ceiling = ordered[-1] if ordered[-1] <= 3 * usual or usual == 0 else 1.5 * usual
    for trit, first, end in PARTS:
        edges = [register - 0.5 for register in range(first, end + 1)]
        axes.stairs(
            shares[first + 121 : end + 121], edges, fill=True, color=TRIT_COLOURS[trit], linewidth=0, antialiased=False
        )
    axes.set_xlim(-123, 123)
    return ceiling or 1.0


def _register_axis(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(lambda value, _: tick(value).replace("-", "−"))
    axes.set_xlabel("register")
    axes.set_ylabel("share of registers")


def _bars(
    axes: Axes, names: Sequence[str], sizes: Sequence[float], colours: Sequence[str], notes: Sequence[str] = ()
) -> None:
    """Horizontal bars, first name on top, each with its size written at its end instead of an axis."""
    places = range(len(names))
    axes.barh(places, sizes, color=colours, height=0.66)
    for place, size in zip(places, sizes, strict=True):
        note = f"   {notes[place]}" if notes and notes[place] else ""
        axes.annotate(
            human_bytes(size) + note, (size, place), (5, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", labelsize=9, labelcolor=INK)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_xlim(0, 1.28 * max([*sizes, 1]))
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.grid(False)
