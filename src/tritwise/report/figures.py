"""How every plot looks: paper, palette, fonts, and PNG files that are the same bytes every time.

Figures are made through matplotlib's objects (Figure, FigureCanvasAgg), never through pyplot, so drawing a report
leaves no state behind in a program that draws figures of its own. Colours: Okabe and Ito, "Color Universal Design"
(2008), which stay apart for colour-blind readers; ordered things (depth, batch) use the sequential map viridis.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritwise.errors import UserError
from tritwise.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, ORANGE, SKY, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7"
INK, MUTED, FAINT, GRID, PAPER = "#1f2430", "#667085", "#b4bac4", "#e9ebef", "#ffffff"
TRIT_COLOURS = {-1: VERMILION, 0: "#98a1ae", 1: BLUE}
WIDTH = 8.4  # inches; at 96 pixels an inch a little under the width of the page's column
DPI = 150

_LOOK: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.labelsize": 9.5,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "text.color": INK,
    "text.parse_math": False,  # a layer's name may hold a dollar sign
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "hatch.linewidth": 0.6,
}


@contextmanager
def look() -> Iterator[None]:
    """matplotlib's defaults with the house style on top, whatever the user's matplotlibrc says; put back afterwards.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("matplotlib is missing; pip install 'tritwise[report]'") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_LOOK)
        yield


def new_figure(
    height: float, rows: int = 1, columns: int = 1, width: float = WIDTH, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of `width` × `height` inches and its axes, row by row. Call it inside `look()`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1, wspace=0.04, hspace=0.05)  # type: ignore[union-attr]
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def sequence_colours(number: int) -> list[str]:
    """`number` colours from dark to light along viridis, its palest fifth left out because it vanishes on white."""
    import matplotlib
    from matplotlib.colors import to_hex

    colours = matplotlib.colormaps["viridis"]
    return [to_hex(colours(0.82 * index / max(1, number - 1))) for index in range(number)]


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Label positions in [0, 1] moved until neighbours are `gap` apart, their order kept: one sweep up, one down."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    placed: list[float] = []
    for index in order:
        placed.append(max(positions[index], placed[-1] + gap) if placed else positions[index])
    ceiling = 1.0
    for rank in range(len(placed) - 1, -1, -1):
        placed[rank] = min(placed[rank], ceiling)
        ceiling = placed[rank] - gap
    result = [0.0] * len(positions)
    for index, position in zip(order, placed, strict=True):
        result[index] = position
    return result


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG without date or program version: the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with look(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing"
        )  # a name in a script DejaVu lacks is drawn as boxes
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def save_png(figure: Figure, path: Path) -> bytes:
    """Write the figure to `path` as a PNG, whole or not at all, and return its bytes.

    Raises:
        UserError: the file cannot be written.
    """
    content = png_bytes(figure)
    atomic_write(path, content)
    return content
