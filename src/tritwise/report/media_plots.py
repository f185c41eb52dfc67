"""Plots of ARB runs: losses and scores of every kind, and a confusion matrix."""

from collections.abc import Sequence
from typing import Any

from tritwise.report.figures import BLUE, GREEN, INK, ORANGE, PURPLE, SKY, VERMILION, look, new_figure

COLOURS = (BLUE, VERMILION, GREEN, ORANGE, SKY, PURPLE)
Lines = dict[str, tuple[list[float], list[float]]]


def learning_figure(losses: Lines, scores: Lines) -> Any:
    """Losses of the batches beside scores on val, against steps. A matplotlib Figure."""
    with look():
        figure, (left, right) = new_figure(3.2, 1, 2)
        for axes, lines, title in ((left, losses, "Batches"), (right, scores, "Val")):
            for place, (name, (x, y)) in enumerate(lines.items()):
                axes.plot(x, y, color=COLOURS[place % len(COLOURS)], label=name, marker="." if len(x) < 12 else "")
            axes.set_title(title)
            axes.set_xlabel("steps")
            if lines:
                axes.legend()
            axes.set_ylim(bottom=0)
    return figure


def confusion_figure(names: Sequence[str], counts: Sequence[Sequence[int]]) -> Any:
    """counts[i][j]: how often class i was told as class j; one more column for what is none. A matplotlib Figure."""
    with look():
        side = min(8.0, 1.6 + 0.42 * len(names))
        figure, (axes,) = new_figure(side, width=side + 0.6)
        axes.imshow(counts, cmap="Blues", vmin=0)
        axes.grid(visible=False)
        axes.set_xticks(range(len(names) + 1), [*names, "other"], rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        top = max(map(max, counts))
        for row, line in enumerate(counts):
            for column, value in enumerate(line):
                if value and len(names) <= 20:
                    colour = "white" if value > top / 2 else INK
                    axes.text(column, row, str(value), ha="center", va="center", fontsize=7.5, color=colour)
    return figure
