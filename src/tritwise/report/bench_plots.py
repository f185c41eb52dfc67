"""The page of a benchmark: `write_bench_report` turns a folder of rows into plots, tables and one HTML file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from tritwise.errors import UserError
from tritwise.files import atomic_write
from tritwise.report.bench_figures import (
    activity_figure,
    curve_of,
    rates_figure,
    rules_loss_figure,
    state_figure,
)
from tritwise.report.bench_rows import Bench, Cell, Variant, default_variant, read_bench, richest_cell
from tritwise.report.bench_tables import LEGEND, Summary, summary, table, weights_of
from tritwise.report.bench_trends import BAND, robustness, robustness_figure, scaling_figure, trends
from tritwise.report.drawing import Plot
from tritwise.report.figures import save_png
from tritwise.report.markup import details, document, escape, note, picture, section
from tritwise.report.markup import table as html_table

TITLES = {
    "state": "Bits per byte against bytes of training state",
    "loss": "Loss against bytes seen",
    "rates": "Tuning of the rate",
    "scaling": "The gap to AdamW against size",
    "robustness": "Without retuning",
    "activity": "Zeros and flips",
}


def write_bench_report(folder: Path, default_rate: float | None = None) -> list[Path]:
    """Draw what `rows.jsonl` in `folder` can show, as PNG files and `index.html` beside it; returns what was written.

    A plot whose rows are missing is left out. A folder with rows of several texts gets the plots of rules for each.

    Args:
        default_rate: the rate of the own rule that `robustness` asks about; without it, the best rate of the
            comparison with the most rules.

    Raises:
        UserError: there are no rows, matplotlib is not installed, or `folder` cannot be written.
    """
    folder = Path(folder)
    bench = read_bench(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; give the folder that holds it")
    entries = summary(bench)
    drawn: dict[str, str] = {}
    paths = []
    for name, plot in choose_bench_plots(bench, default_rate).items():
        paths.append(folder / f"{name}.png")
        drawn[name] = picture(save_png(plot.figure(), paths[-1]), plot.alt, plot.caption)
    page = folder / "index.html"
    atomic_write(page, render_bench(bench, entries, drawn).encode("utf-8"))
    return [*paths, page]


def choose_bench_plots(bench: Bench, default_rate: float | None = None) -> dict[str, Plot]:
    """File stem -> plot, for every plot that the rows are enough for: `state`, `loss`, `rates`, `activity` for the
    richest comparison of each text (after the first text with its name: `state_enwik8`), `scaling`, `robustness`."""
    entries = summary(bench)
    default = _default(bench, entries)
    found: dict[str, Plot] = {}
    for index, cell in enumerate(home_cells(bench)):
        own = [entry for entry in entries if entry.cell == cell]
        for name, plot in _rule_plots(own, default, bench.ladder(cell)).items():
            found[f"{name}_{_stem(cell.data, index)}" if index else name] = plot
    if lines := trends(entries, default):
        captions = "; ".join(line.caption for line in lines)
        found["scaling"] = Plot(
            lambda: scaling_figure(lines),
            f"Gap to AdamW against weights: {captions}",
            "Bits per byte of ours minus those of AdamW, each at its best rate; bars reach from seed to seed. Dashed: "
            f"least squares in the logarithm of the weights. {captions}.",
        )
    home = next(iter(home_cells(bench)), None)
    best = next((e.best.rate for e in entries if e.cell == home and e.variant == default), None)
    rate = best if default_rate is None else default_rate
    tuned = [entry.cell for entry in entries if entry.variant == default and len(entry.tried) > 1]
    costs_of = (robustness(entries, default, cell, rate) for cell in (home, *tuned))
    if costs := max(costs_of, key=lambda costs: sum(map(len, costs.values()))):
        worst = max(point.bpb for points in costs.values() for point in points)
        tried = sorted({point.rates for points in costs.values() for point in points})
        rates = f"{tried[0]}" if len(tried) == 1 else f"{tried[0]} to {tried[-1]}"
        found["robustness"] = Plot(
            lambda: robustness_figure(costs),
            f"Bits per byte lost by keeping the rate {rate:g}: at most {worst:.3f}",
            f"Ours at the rate {rate:g} everywhere, minus ours at the best of {rates} rates tried at each batch and "
            f"width. Band: ±{BAND}. Hollow: the best rate is the lowest or highest tried, a better one may exist.",
        )
    return found


def home_cells(bench: Bench) -> list[Cell]:
    """The comparison with the most rules of each text, the one with the most of all first."""
    rest, cells = list(bench.trials), []
    while (cell := richest_cell(rest)) is not None:
        cells.append(cell)
        rest = [trial for trial in rest if (trial.cell.data, trial.cell.split) != (cell.data, cell.split)]
    return cells


def render_bench(bench: Bench, entries: Sequence[Summary], drawn: Mapping[str, str]) -> str:
    """The page as HTML. `drawn` maps file stems of `choose_bench_plots` to figures."""
    homes = home_cells(bench)
    names = sorted({trial.cell.bench for trial in bench.trials} - {""})
    title = " and ".join(names) or "benchmark"
    aside = "".join(f"<p>{escape(text)}</p>" for text in bench.notes)
    head = (
        f'<header>\n<p class="eyebrow">Tritwise benchmark</p>\n<h1>{escape(title)}</h1>\n'
        f'<p class="muted">{escape(f"{len(bench.trials)} runs")}</p>\n'
        + (f"<aside>{aside}</aside>\n" if aside else "")
        + "</header>"
    )
    parts = [head]
    for cell in homes:
        heading = "Every rule at its best rate" + (f": {cell.data}" if len(homes) > 1 else "")
        parts.append(section(heading, note(_title(cell, entries)), _table(cell, entries), note(LEGEND)))
    for stem, heading in TITLES.items():
        shown = [figure for name, figure in drawn.items() if name == stem or name.startswith(f"{stem}_")]
        parts += [section(heading, *shown)] if shown else []
    others = [cell for cell in dict.fromkeys(entry.cell for entry in entries) if cell not in homes]
    if others:
        tables = [details(_title(cell, entries), _table(cell, entries)) for cell in others]
        parts.append(section("Other sizes, lengths and batches", *tables))
    parts.append(f"<footer>{escape(_provenance(bench))}</footer>")
    return document(f"{title} · Tritwise", "\n".join(parts))


def _rule_plots(
    entries: Sequence[Summary], default: Variant | None, ladder: Sequence[tuple[str, float]]
) -> dict[str, Plot]:
    entries = _telling(entries, default)
    scored = [entry for entry in entries if entry.mean is not None]
    found: dict[str, Plot] = {}
    if not scored:
        return found
    title = scored[0].cell.title(weights_of(scored))
    first = f"{scored[0].label} is best with {scored[0].mean or 0:.3f} bits per byte"
    curves = [entry for entry in _one_a_rule(scored, default) if curve_of(entry)[0]]
    if curves:
        found["loss"] = Plot(
            lambda: rules_loss_figure(curves, ladder, default),
            f"Training loss against bytes seen for {len(curves)} rules; {first}",
            f"{title}. Each rule at its best rate, its first seed, smoothed. Dashed: simple models and the "
            "uniform model, on the validation text.",
        )
    if any((entry.bytes_per_weight or 0) > 0 for entry in scored):
        found["state"] = Plot(
            lambda: state_figure(scored, default),
            f"Validation bits per byte against bytes of training state per weight for {len(scored)} rules; {first}",
            f"{title}. Each rule at its best rate, mean over seeds; bars reach from the lowest seed to the highest. "
            "Gradients and activations are not in the bytes. Down and to the left is better.",
        )
    if any(sum((one.rate or 0) > 0 for one in entry.tried) > 1 for entry in entries):
        found["rates"] = Plot(
            lambda: rates_figure(entries),
            f"Validation bits per byte against the rate, a panel a rule; {first}",
            f"{title}. Bits per byte above the rule's own best, which is written over the panel. Dots are runs, "
            "the line their mean, the ring the best; a cross at the top is a run that diverged or lies above.",
        )
    keys = ("zero_fraction", "flip_rate", "flip_back")
    if any(getattr(entry, key) is not None for entry in scored for key in keys):
        found["activity"] = Plot(
            lambda: activity_figure(scored),
            "Bars of zeros, flips a step and flips undone, for each rule that has ternary weights",
            f"{title}. Each rule at its best rate. Flips are leading trits that change in a step, over the last tenth "
            "of training; flips undone are of a fixed sample of weights.",
        )
    return found


def _telling(entries: Sequence[Summary], default: Variant | None) -> list[Summary]:
    """Without the variants that are worse than another of the same rule and size: those are for the tables."""
    chosen: dict[tuple[str, float | None], Summary] = {}
    for entry in entries:
        size = entry.bytes_per_weight
        chosen.setdefault((entry.variant.rule, size if size is None else round(size, 1)), entry)
    return [entry for entry in entries if entry.variant == default or entry in chosen.values()]


def _one_a_rule(entries: Sequence[Summary], default: Variant | None) -> list[Summary]:
    """The best variant of each rule, of the own rule the default one: as many lines as can be told apart."""
    chosen: dict[str, Summary] = {}
    for entry in entries:
        if entry.variant == default or entry.variant.rule not in chosen:
            chosen[entry.variant.rule] = entry
    return list(chosen.values())


def _default(bench: Bench, entries: Sequence[Summary]) -> Variant | None:
    best: dict[Variant, float] = {}
    for entry in entries:
        best[entry.variant] = min(best.get(entry.variant, math.inf), math.inf if entry.mean is None else entry.mean)
    return default_variant(bench.trials, best)


def _title(cell: Cell, entries: Sequence[Summary]) -> str:
    return cell.title(weights_of([entry for entry in entries if entry.cell == cell]))


def _table(cell: Cell, entries: Sequence[Summary]) -> str:
    head, rows = table([entry for entry in entries if entry.cell == cell])
    return html_table(head, rows, numeric=range(1, len(head)))


def _stem(data: str, index: int) -> str:
    """A text's name as part of a file name."""
    return "".join(letter if letter.isalnum() else "-" for letter in data.lower())[:40] or str(index + 1)


def _provenance(bench: Bench) -> str:
    told = []
    for key, word in (("tritwise", "Tritwise"), ("commit", "commit"), ("torch", "torch"), ("device", "")):
        values = sorted({v for trial in bench.trials if isinstance(v := trial.row.get(key), str) and v})
        told += [f"{word} {', '.join(values)}".strip()] if values else []
    return " · ".join(told) or "Tritwise"
