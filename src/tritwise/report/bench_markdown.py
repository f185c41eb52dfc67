"""Tables of a benchmark in Markdown: every rule, the own rule's variants, a recipe, and one for readers in a hurry."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from tritwise.report.bench_rows import (
    Bench,
    Cell,
    Trial,
    Variant,
    default_variant,
    differences,
    labels,
    richest_cell,
    sort_rows,
)
from tritwise.report.bench_tables import HEAD, LEGEND, Summary, cells_of, summary, table, weights_of
from tritwise.report.numbers import count, number

SEEDS = 3  # that a figure should have
MANY = 5  # variants of the own rule that a length needs for a table of its own
NO_RULES = "No rules have been measured yet."


def rules_markdown(source: Bench | Iterable[Mapping[str, Any]], cell: Cell | None = None) -> str:
    """A Markdown table of the rules in `cell` (default: the one with the most variants), the own rule in bold."""
    bench = source if isinstance(source, Bench) else sort_rows(source)
    cell = cell or richest_cell(bench.trials)
    entries = [entry for entry in summary(bench) if entry.cell == cell]
    if cell is None:
        return NO_RULES
    devices = Counter(entry.device for entry in entries if entry.device and entry.step_ms is not None)
    timed, legend = "", LEGEND
    if len(devices) > 1:  # times on several devices say nothing about rules
        timed = devices.most_common(1)[0][0]
        entries = [entry if entry.device == timed else replace(entry, step_ms=None) for entry in entries]
        legend = f"{LEGEND} ms/step: of rows from one device, {timed}."
    head, rows = table(entries)
    for entry, row in zip(entries, rows, strict=True):
        row[:3] = [f"**{text}**" if entry.own and text else text for text in row[:3]]
    return f"{_plain(cell.title(weights_of(entries)))}\n\n{markdown(head, rows)}\n\n{legend}"


def texts_markdown(source: Bench | Iterable[Mapping[str, Any]]) -> str:
    """`rules_markdown` of every text that was read, of each the cell with the most variants; the richest text first."""
    bench = source if isinstance(source, Bench) else sort_rows(source)
    trials, made = bench.trials, list[str]()
    while (cell := richest_cell(trials)) is not None:
        made.append(rules_markdown(bench, cell))
        trials = [trial for trial in trials if trial.cell.data != cell.data]
    return "\n\n".join([*(text.removesuffix(f"\n\n{LEGEND}") for text in made[:-1]), *made[-1:]]) or NO_RULES


def recipe_markdown(source: Bench | Iterable[Mapping[str, Any]], name: str) -> str:
    """A Markdown table of every set-up of the benchmark `name`, in nats a byte, the least mean first."""
    bench = source if isinstance(source, Bench) else sort_rows(source)
    groups: dict[tuple[Variant, float | None, float | None], list[Trial]] = {}
    for trial in bench.trials:
        if trial.cell.bench == name and trial.bpb is not None:
            groups.setdefault((trial.variant, trial.cell.steps, trial.rate), []).append(trial)
    if not groups:
        return "Nothing has been measured yet."
    shown = {variant: _without_dropout(variant) for variant, *_ in groups}
    names = labels(shown.values())
    made = []
    for (variant, steps, rate), trials in groups.items():
        nats = [trial.bpb * math.log(2) for trial in trials if trial.bpb is not None]
        train = [value for trial in trials if (value := number(trial.row.get("train_nats"))) is not None]
        told = [
            names[shown[variant]],
            f"{number(variant.values.get('dropout')) or 0:g}",
            "" if steps is None else count(steps),
            "" if rate is None else f"{rate:g}",
        ]
        told += [f"{fmean(nats):.4f}", str(len(nats)), f"{max(nats) - min(nats):.4f}" if len(nats) > 1 else ""]
        told += [f"{fmean(train):.3f}" if train else ""]
        made.append((fmean(nats), [f"**{text}**" if variant.own and text else text for text in told[:5]] + told[5:]))
    made.sort(key=lambda row: row[0])
    head = ["rule", "dropout", "steps", "rate", "val nats", "n", "spread", "train nats"]
    return markdown(head, [row for _, row in made])


def short_markdown(source: Bench | Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table for readers in a hurry: of the cell that `rules_markdown` shows each rule's best variant, and of
    the own rule the best of each number of bytes a weight. One with fewer than SEEDS seeds is chosen only where none
    has as many: the best of many single runs is a lucky one."""
    bench = source if isinstance(source, Bench) else sort_rows(source)
    cell = richest_cell(bench.trials)
    entries = [entry for entry in summary(bench) if entry.cell == cell and entry.mean is not None]
    if cell is None or not entries:
        return "No rules have been measured yet."
    best: dict[tuple[str, int], Summary] = {}
    for entry in sorted(entries, key=lambda entry: len(entry.runs) < SEEDS):  # of each kind the best first
        best.setdefault((entry.variant.rule, round(entry.bytes_per_weight or 0) if entry.own else 0), entry)
    rows = []
    for entry in sorted(best.values(), key=entries.index):
        told = dict(zip(HEAD, cells_of(entry), strict=True))
        row = [entry.label, told["val bpb"], told["n"], told["B/weight"], told["float state"]]
        rows.append([f"**{text}**" if entry.own and text else text for text in row[:2]] + row[2:])
    head = ["rule", "val bpb", "seeds", "bytes a weight", "of them floats"]
    return f"{_plain(cell.title(weights_of(entries)))}\n\n{markdown(head, rows)}"


def ablation_markdown(source: Bench | Iterable[Mapping[str, Any]]) -> str:
    """Markdown tables of the own rule's variants, each beside the default one: of the cell with the most of them, and
    of the same cell at other lengths that have MANY."""
    bench = source if isinstance(source, Bench) else sort_rows(source)
    richest = richest_cell(bench.trials, own_only=True)
    found: dict[Cell, list[Summary]] = {}
    for entry in summary(bench):
        if entry.own and richest is not None and replace(entry.cell, steps=richest.steps) == richest:
            found.setdefault(entry.cell, []).append(entry)
    tables = [
        _ablation_table(cell, entries, bench)
        for cell, entries in sorted(found.items(), key=lambda item: -(item[0].steps or 0))
        if len(entries) >= (2 if cell == richest else MANY)
    ]
    return "\n\n".join(table for table in tables if table) or "No variants have been measured yet."


def _ablation_table(cell: Cell, entries: Sequence[Summary], bench: Bench) -> str:
    default = default_variant([trial for trial in bench.trials if trial.cell == cell], _means(entries))
    first = next((entry for entry in entries if entry.variant == default), None)
    if first is None:
        return ""
    head = ["what differs", "rate", "val bpb", "against the default", "n", "spread", "B/weight", "zeros"]
    rows = []
    for entry in [first, *(entry for entry in entries if entry is not first)]:
        gap = "" if entry.mean is None or first.mean is None else f"{entry.mean - first.mean:+.3f}".replace("-", "−")
        name = "**default**" if entry is first else differences(first.variant, entry.variant)
        told = dict(zip(HEAD, cells_of(entry), strict=True))
        rest = [told[key] for key in ("n", "spread", "B/weight", "zeros")]
        rows.append([name, told["rate"], told["val bpb"], "" if entry is first else gap, *rest])
    return f"{_plain(cell.title(weights_of(entries)))}\n\n{markdown(head, rows)}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    lines = [head, [":--", *("--:" for _ in head[1:])], *rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines)


def _without_dropout(variant: Variant) -> Variant:
    kept = {key: value for key, value in variant.values.items() if key != "dropout"}
    return replace(variant, settings=json.dumps(kept, sort_keys=True, ensure_ascii=False))


def _means(entries: Iterable[Summary]) -> dict[Variant, float]:
    return {entry.variant: entry.mean for entry in entries if entry.mean is not None}


def _plain(text: str) -> str:
    """Text that cannot end a cell of a Markdown table or its line."""
    return " ".join(text.replace("|", "\\|").split())
