"""Names written beside lines and points, so that none lies on another: no legend to look up thirteen colours in.

Both functions measure text as it will be drawn, so they come last, when limits and titles are set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tritwise.report.figures import FAINT, INK, PAPER, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = 7.8  # points
LONGEST = 36  # characters of a name
_REACHES = (7, 11, 16, 22, 29, 37, 46, 56, 68, 82)  # points between a dot and its name, nearest first
_ANGLES = (0, 180, 25, -25, 155, -155, 90, -90, 60, -60, 120, -120)  # degrees, best first


@dataclass(frozen=True)
class Label:
    """A name and the place in data coordinates that it belongs to."""

    text: str
    x: float
    y: float
    colour: str = INK
    bold: bool = False


def shorten(text: str) -> str:
    """A name cut to `LONGEST` characters."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def end_labels(axes: Axes, entries: Sequence[Label]) -> None:
    """Write each name to the right of the end (x, y) of its line, at its height or as near as the others let it.

    Widens the horizontal axis until the longest name fits; a thin line leads from where a line ends to a name that
    had to move.
    """
    if not entries:
        return
    figure = axes.figure
    figure.draw_without_rendering()  # type: ignore[union-attr]
    box, point = axes.get_window_extent(), _point(axes)
    widest = max(_extent(axes, entry)[0] for entry in entries) / box.width
    end = max(entry.x for entry in entries)
    lead = 16 * point / box.width
    scale = axes.xaxis.get_transform()  # along the axis as drawn, logarithmic or not
    low, last = (float(scale.transform(value)) for value in (axes.get_xlim()[0], end))
    right = low + (last - low) / max(0.2, 1 - lead - widest - 0.01)
    axes.set_xlim(axes.get_xlim()[0], float(scale.inverted().transform(right)))
    to_data = axes.transData.inverted()
    bottom, top = axes.get_ylim()
    heights = [
        axes.transAxes.inverted().transform(axes.transData.transform((entry.x, entry.y)))[1] for entry in entries
    ]
    gap = 1.32 * SIZE * point / box.height
    starts = axes.transAxes.inverted().transform(axes.transData.transform((end, bottom)))[0]
    # Moved up only, and moved down only: between the two a crowd stays about its middle, and as far apart.
    upward, downward = spread(heights, gap), [1 - down for down in spread([1 - height for height in heights], gap)]
    for entry, height, up, down in zip(entries, heights, upward, downward, strict=True):
        placed = (up + down) / 2
        if abs(placed - height) > 0.35 * gap:
            corner = to_data.transform(axes.transAxes.transform((starts + 0.75 * lead, placed)))
            axes.plot([entry.x, corner[0]], [entry.y, corner[1]], color=FAINT, linewidth=0.6, zorder=1.2)
        axes.text(
            starts + lead,
            placed,
            shorten(entry.text),
            transform=axes.transAxes,
            va="center",
            fontsize=SIZE,
            color=entry.colour,
            fontweight="bold" if entry.bold else "normal",
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.5},
        ).set_in_layout(False)
    axes.set_ylim(bottom, top)


def point_labels(axes: Axes, entries: Sequence[Label], obstacles: Sequence[tuple[float, float]] = ()) -> None:
    """Write each name beside its point, where it covers least of the other names, the points and the `obstacles`.

    Names are placed one by one, the bold first; each takes the best of the places around its point, near before far.
    """
    if not entries:
        return
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    box, point = axes.get_window_extent(), _point(axes)
    spots = [axes.transData.transform(place) for place in [*((e.x, e.y) for e in entries), *obstacles]]
    taken = [(x - 5 * point, y - 4 * point, x + 5 * point, y + 4 * point) for x, y in spots]
    order = sorted(range(len(entries)), key=lambda index: (not entries[index].bold, -entries[index].y))
    for index in order:
        entry, (x, y) = entries[index], spots[index]
        wide, tall = _extent(axes, entry)
        best: tuple[float, int, int] | None = None
        chosen = (0.0, 0.0, 0.0, 0.0)
        for reach in _REACHES:
            for rank, angle in enumerate(_ANGLES):
                left, bottom = _corner(x, y, reach * point, angle, wide, tall)
                place = (left, bottom, left + wide, bottom + tall)
                covered = sum(_overlap(place, other) for other in taken)
                outside = wide * tall - _overlap(place, (box.x0, box.y0, box.x1, box.y1))
                cost = (covered + 3 * outside) / (wide * tall)
                score = (round(cost, 3) + 0.002 * reach, rank, reach)
                if best is None or score < best:
                    best, chosen = score, place
        assert best is not None
        taken.append(chosen)
        centre = (chosen[1] + chosen[3]) / 2
        far = best[2] > 2 * _REACHES[0]
        edge = chosen[0] if chosen[0] > x else chosen[2] if chosen[2] < x else (chosen[0] + chosen[2]) / 2
        axes.annotate(
            shorten(entry.text),
            tuple(axes.transData.inverted().transform((chosen[0], centre))),
            va="center",
            ha="left",
            fontsize=SIZE,
            color=entry.colour,
            fontweight="bold" if entry.bold else "normal",
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
            zorder=4,
        ).set_in_layout(False)
        if far:
            target = axes.transData.inverted().transform((edge, centre))
            axes.plot([entry.x, target[0]], [entry.y, target[1]], color=FAINT, linewidth=0.6, zorder=1.2)


def _point(axes: Axes) -> float:
    """Pixels of one point, 1/72 inch."""
    return axes.figure.dpi / 72  # type: ignore[union-attr]


def _extent(axes: Axes, entry: Label) -> tuple[float, float]:
    """Width and height in pixels of a name."""
    text = axes.text(0, 0, shorten(entry.text), fontsize=SIZE, fontweight="bold" if entry.bold else "normal")
    box = text.get_window_extent(axes.figure.canvas.get_renderer())  # type: ignore[union-attr]
    text.remove()
    return box.width, box.height


def _corner(x: float, y: float, reach: float, angle: float, wide: float, tall: float) -> tuple[float, float]:
    """The lower left corner of a name at `reach` pixels from (x, y) in the direction of `angle`."""
    across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    left = x + reach * across - (0 if across > 0.3 else wide if across < -0.3 else wide / 2)
    bottom = y + reach * up - (0 if up > 0.3 else tall if up < -0.3 else tall / 2)
    return left, bottom


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)
