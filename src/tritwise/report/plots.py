"""Every plot of the project, to import from one place: functions from plain lists and dicts to a matplotlib Figure.

`save_png(figure, path)` writes a figure as a PNG whose bytes depend on nothing but the figure. matplotlib is the
optional extra `report`; all of these raise UserError when it is not installed.
"""

from tritwise.report.bars import histogram_figure, histogram_grid_figure, memory_figure
from tritwise.report.curves import loss_figure, pace_figure, step_cost_figure
from tritwise.report.figures import png_bytes, save_png
from tritwise.report.layers import LEGEND_LAYERS, layers_figure

__all__ = [
    "LEGEND_LAYERS",
    "histogram_figure",
    "histogram_grid_figure",
    "layers_figure",
    "loss_figure",
    "memory_figure",
    "pace_figure",
    "png_bytes",
    "save_png",
    "step_cost_figure",
]
