"""Which plots a run can show: each part of a run folder to its figure, or to a line that says why there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tritwise.report import plots
from tritwise.report.numbers import count, exact_bytes, number, percent
from tritwise.report.reader import Run, layer_series, mapping, series

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Plot:
    """A plot the run can show: how to draw it, what a blind reader is told, and the line under it."""

    figure: Callable[[], Figure]
    alt: str
    caption: str


def choose_plots(run: Run) -> dict[str, Plot | str]:
    """File stem -> the plot, or the reason why it is left out (empty where another reason has said it)."""
    return {
        "loss": _loss(run),
        "layers": _layers(run),
        "registers": _registers(run),
        "registers_by_layer": _registers_by_layer(run),
        "memory": _memory(run),
        "pace": _pace(run),
    }


def skipped_steps(run: Run) -> tuple[list[float], float | None]:
    """Steps at which the running count of skipped steps grew, and the last count; None if the run kept no count."""
    steps, counts = series(run.train, "step", "skipped")
    grown = [step for step, old, new in zip(steps, [0.0, *counts], counts, strict=False) if new > old]
    return grown, counts[-1] if counts else None


def ladder_points(run: Run) -> list[tuple[str, float]]:
    """(name, nats per byte) for each row of the ladder."""
    return [(str(row["name"]), float(row["nats"])) for row in run.ladder]


def _positive(line: tuple[list[float], list[float]]) -> tuple[list[float], list[float]]:
    kept = [(x, y) for x, y in zip(*line, strict=True) if y > 0]  # a logarithmic axis has no zero
    return [x for x, _ in kept], [y for _, y in kept]


def _loss(run: Run) -> Plot | str:
    train, val = _positive(series(run.train, "bytes", "loss")), _positive(series(run.evals, "bytes", "loss"))
    if not train[0] and not val[0]:
        return "No loss against bytes in metrics.jsonl: the learning curve is left out."
    ladder = ladder_points(run)
    end = (val[1] or train[1])[-1]
    lines = (
        " Dashed: the ladder of simple models on the same text."
        if ladder
        else " No ladder.json: no models to compare with."
    )
    return Plot(
        lambda: plots.loss_figure(train, val, ladder),
        f"Loss against bytes seen, ending at {end:.3f} nats per byte",
        "Loss against the bytes trained on; faint: single steps." + lines,
    )


def _layers(run: Run) -> Plot | str:
    flips, zeros = layer_series(run.layers, "bytes", "flip_rate"), layer_series(run.layers, "bytes", "zero_fraction")
    if not flips and not zeros:
        return "No rows of kind “layers” in metrics.jsonl: flips and zeros per layer are left out."
    many = len(flips.keys() | zeros.keys()) > plots.LEGEND_LAYERS
    caption = "A flip is a leading trit that changed in a step. Dark lines lie early in the model, light ones late."
    caption += " Thin: single layers; bold: the median of a block." if many else ""
    alt = f"Flip rate and zero fraction of {len(flips.keys() | zeros.keys())} layers against bytes seen"
    return Plot(lambda: plots.layers_figure(flips, zeros), alt, caption)


def _registers(run: Run) -> Plot | str:
    if not run.histogram:
        return "No histogram.json: the histogram of registers is left out."
    total = [sum(counts) for counts in zip(*run.histogram.values(), strict=True)]
    ends = (total[0] + total[-1]) / (sum(total) or 1)
    when = f" at step {count(run.histogram_step)}" if run.histogram_step is not None else ""
    caption = (
        f"All {count(sum(total))} registers{when}. The colour is the leading trit, which is the weight; "
        f"the dashed lines at ±40.5 are where it flips. {percent(ends)} sit at an end, ±121."
    )
    return Plot(lambda: plots.histogram_figure(total), f"Histogram of registers{when}, −121 to 121", caption)


def _registers_by_layer(run: Run) -> Plot | str:
    if not run.histogram:
        return ""  # _registers has said so
    caption = "The same for each kind of layer, added over depth; each panel has its own height."
    alt = "Histograms of registers for each kind of layer"
    return Plot(lambda: plots.histogram_grid_figure(run.histogram), alt, caption)


def _memory(run: Run) -> Plot | str:
    roles = {
        role: size
        for role, value in mapping(run.audit.get("bytes_by_role")).items()
        if (size := number(value) or 0) > 0
    }
    weights = number(run.audit.get("weights"))
    if not roles or not weights or weights < 0:
        return "No bytes by role and weights in audit.json: the memory plot is left out."
    caption = (
        "State that lives from one step to the next; gradients of this run live only while their layer is updated and "
        "are not in it. The bars for AdamW are computed: 12 bytes a weight, 16 with its gradient."
    )
    peak = number(run.audit.get("peak_bytes"))
    caption += f" Peak of the whole process: {exact_bytes(peak)}." if peak else ""
    alt = f"Training holds {exact_bytes(sum(roles.values()))} between steps"
    return Plot(lambda: plots.memory_figure(roles, weights), alt, caption)


def _pace(run: Run) -> Plot | str:
    rate, speed = series(run.train, "step", "rate"), series(run.train, "step", "bytes_per_second")
    if not rate[0] and not speed[0]:
        return "No rate or bytes per second in metrics.jsonl: the plot of the pace is left out."
    steps, total = skipped_steps(run)
    if total is None:
        skipped = "Skipped steps were not recorded."
    else:
        which = f"{count(total)} step{'s were' if total > 1 else ' was'}" if total else "No step was"
        skipped = f"{which} skipped for a gradient that was not finite."
    return Plot(lambda: plots.pace_figure(rate, speed, steps), "Rate and throughput against steps", skipped)
