"""Tables of a benchmark: each rule at its best rate, and the own rule's variants beside its default."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median, stdev
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
from tritwise.report.numbers import count, human_bytes, number, percent, significant

HEAD = (
    "rule",
    "rate",
    "val bpb",
    "n",
    "spread",
    "sd",
    "B/weight",
    "float state",
    "flips/step",
    "flipped back",
    "zeros",
    "saturated",
    "ms/step",
)
EDGES = {"lowest": " ↓", "highest": " ↑", "only": " ○", "": ""}
LEGEND = (
    "Each rule at its best rate: ↓ ↑ it is the lowest or highest that was tried, ○ the only one. n: seeds; 2 of 3: the "
    "third diverged. spread: highest − lowest seed. sd: standard deviation over seeds. B/weight: bytes of weights and "
    "optimizer between steps. float state: bytes of it in floats. flips/step: leading trits that change in a step, in "
    "the last tenth of training. flipped back: flips undone within 100 steps. saturated: registers at ±121."
)


@dataclass(frozen=True)
class Tried:
    """One rate of a variant: the val bpb of each finished run, by seed, and how many runs have no score."""

    rate: float | None
    scores: Mapping[float | None, float]
    diverged: int

    @property
    def mean(self) -> float | None:
        """Mean val bpb over the finished runs, or None."""
        return fmean(self.scores.values()) if self.scores else None


@dataclass(frozen=True)
class Summary:
    """A variant in a cell at its best rate. Figures are means over its finished runs (time: the median), or None."""

    cell: Cell
    variant: Variant
    label: str
    best: Tried
    tried: tuple[Tried, ...]  # every rate, rising; best is one of them
    runs: tuple[Trial, ...]  # the finished runs at the best rate, by seed
    weights: float | None
    bytes_per_weight: float | None
    float_state_bytes: float | None
    flip_rate: float | None
    flip_back: float | None
    zero_fraction: float | None
    saturation: float | None
    step_ms: float | None
    device: str  # of all of these runs; "" if there were several

    @property
    def own(self) -> bool:
        """Whether it is the project's own rule."""
        return self.variant.own

    @property
    def mean(self) -> float | None:
        """Mean val bpb at the best rate."""
        return self.best.mean

    @property
    def spread(self) -> float | None:
        """Highest minus lowest val bpb over seeds; None for fewer than two."""
        scores = self.best.scores.values()
        return max(scores) - min(scores) if len(scores) > 1 else None

    @property
    def sd(self) -> float | None:
        """Sample standard deviation of val bpb over seeds; None for fewer than two."""
        scores = list(self.best.scores.values())
        return stdev(scores) if len(scores) > 1 else None

    @property
    def edge(self) -> str:
        """Whether the best rate is the "lowest", the "highest" or the "only" one tried; "" if it lies between others.

        A rate at which every run diverged counts as tried: it shows that the grid went far enough.
        """
        rates = [tried.rate for tried in self.tried if tried.rate is not None]
        if not rates or self.mean is None or self.best.rate is None:
            return ""
        if len(rates) == 1:
            return "only"
        return "lowest" if self.best.rate == rates[0] else "highest" if self.best.rate == rates[-1] else ""


def summary(source: Bench | Iterable[Mapping[str, Any]]) -> list[Summary]:
    """Each variant in each cell at its best rate: cells in the order of their first row, best rule first in each.

    The best rate is the one of the lowest mean val bpb over the seeds that all rates have in common, or over all seeds
    where they have none: so three seeds at one rate stand beside the one seed that the others were tried with. A rate
    with a diverged run is the best only if no rate is without one.
    """
    trials = (source if isinstance(source, Bench) else sort_rows(source)).trials
    names = labels(trial.variant for trial in trials)
    groups: dict[Cell, dict[Variant, list[Trial]]] = {}
    for trial in trials:
        groups.setdefault(trial.cell, {}).setdefault(trial.variant, []).append(trial)
    made = []
    for variants in groups.values():
        rows = [_summarise(names[variant], own) for variant, own in variants.items()]
        made += sorted(rows, key=lambda row: (math.inf if row.mean is None else row.mean, row.label))
    return made


def table(summaries: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of text, for rich, HTML or Markdown; a column that would be empty is left out."""
    cells = [_row(entry) for entry in summaries]
    keep = [column for column in range(len(HEAD)) if column < 4 or any(row[column] for row in cells)]
    return [HEAD[column] for column in keep], [[row[column] for column in keep] for row in cells]


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


def rules_markdown(source: Bench | Iterable[Mapping[str, Any]], cell: Cell | None = None) -> str:
    """A Markdown table of the rules in `cell` (default: the one with the most variants), the own rule in bold."""
    bench = source if isinstance(source, Bench) else sort_rows(source)
    cell = cell or richest_cell(bench.trials)
    entries = [entry for entry in summary(bench) if entry.cell == cell]
    if cell is None:
        return "No rules have been measured yet."
    devices = Counter(entry.device for entry in entries if entry.device and entry.step_ms is not None)
    timed, legend = "", LEGEND
    if len(devices) > 1:  # times on several devices say nothing about rules
        timed = devices.most_common(1)[0][0]
        entries = [entry if entry.device == timed else replace(entry, step_ms=None) for entry in entries]
        legend = f"{LEGEND} ms/step: of rows from one device, {timed}."
    head, rows = table(entries)
    for entry, row in zip(entries, rows, strict=True):
        row[:3] = [f"**{text}**" if entry.own and text else text for text in row[:3]]
    return f"{_plain(cell.title(_weights(entries)))}\n\n{markdown(head, rows)}\n\n{legend}"


def short_markdown(source: Bench | Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table for readers in a hurry: of the cell that `rules_markdown` shows each rule's best variant, and of
    the own rule the best of each number of bytes a weight."""
    bench = source if isinstance(source, Bench) else sort_rows(source)
    cell = richest_cell(bench.trials)
    entries = [entry for entry in summary(bench) if entry.cell == cell and entry.mean is not None]
    if cell is None or not entries:
        return "No rules have been measured yet."
    best: dict[tuple[str, int], Summary] = {}
    for entry in entries:  # the best first
        best.setdefault((entry.variant.rule, round(entry.bytes_per_weight or 0) if entry.own else 0), entry)
    rows = []
    for entry in best.values():
        told = dict(zip(HEAD, _row(entry), strict=True))
        row = [entry.label, told["val bpb"], told["n"], told["B/weight"], told["float state"]]
        rows.append([f"**{text}**" if entry.own and text else text for text in row[:2]] + row[2:])
    head = ["rule", "val bpb", "seeds", "bytes a weight", "of them floats"]
    return f"{_plain(cell.title(_weights(entries)))}\n\n{markdown(head, rows)}"


def ablation_markdown(source: Bench | Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table of the own rule's variants, in the cell with the most of them, beside the default one."""
    bench = source if isinstance(source, Bench) else sort_rows(source)
    cell = richest_cell(bench.trials, own_only=True)
    entries = [entry for entry in summary(bench) if entry.cell == cell and entry.own]
    default = default_variant([trial for trial in bench.trials if trial.cell == cell], _means(entries))
    first = next((entry for entry in entries if entry.variant == default), None)
    if cell is None or first is None or len(entries) < 2:
        return "No variants have been measured yet."
    head = ["what differs", "rate", "val bpb", "against the default", "n", "spread", "B/weight", "zeros"]
    rows = []
    for entry in [first, *(entry for entry in entries if entry is not first)]:
        gap = "" if entry.mean is None or first.mean is None else f"{entry.mean - first.mean:+.3f}".replace("-", "−")
        name = "**default**" if entry is first else differences(first.variant, entry.variant)
        told = dict(zip(HEAD, _row(entry), strict=True))
        rest = [told[key] for key in ("n", "spread", "B/weight", "zeros")]
        rows.append([name, told["rate"], told["val bpb"], "" if entry is first else gap, *rest])
    return f"{_plain(cell.title(_weights(entries)))}\n\n{markdown(head, rows)}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    lines = [head, [":--", *("--:" for _ in head[1:])], *rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines)


def _summarise(label: str, trials: list[Trial]) -> Summary:
    by_rate: dict[float | None, list[Trial]] = {}
    for trial in trials:
        by_rate.setdefault(trial.rate, []).append(trial)
    rates = sorted(by_rate, key=lambda rate: -math.inf if rate is None else rate)
    tried = []
    for rate in rates:
        scores = {trial.seed: trial.bpb for trial in by_rate[rate] if trial.bpb is not None}
        tried.append(Tried(rate, scores, len(by_rate[rate]) - len(scores)))
    best = _best(tried)
    finished = [trial for trial in by_rate[best.rate] if trial.bpb is not None]
    runs = sorted(finished, key=lambda trial: -1 if trial.seed is None else trial.seed)

    def of(key: str) -> list[float]:
        return [value for trial in runs or trials if (value := number(trial.row.get(key))) is not None]

    def mean(key: str) -> float | None:
        return fmean(values) if (values := of(key)) else None

    return Summary(
        cell=trials[0].cell,
        variant=trials[0].variant,
        label=label,
        best=best,
        tried=tuple(tried),
        runs=tuple(runs),
        weights=mean("weights"),
        bytes_per_weight=mean("bytes_per_weight"),
        float_state_bytes=mean("float_state_bytes"),
        flip_rate=mean("flip_rate"),
        flip_back=mean("flip_back"),
        zero_fraction=mean("zero_fraction"),
        saturation=mean("saturation"),
        step_ms=median(times) if (times := of("step_ms")) else None,
        device="" if len(devices := {str(trial.row.get("device") or "") for trial in runs}) != 1 else devices.pop(),
    )


def _best(tried: Sequence[Tried]) -> Tried:
    finished = [one for one in tried if one.scores and not one.diverged] or [one for one in tried if one.scores]
    if not finished:
        return tried[0]
    shared = set(finished[0].scores).intersection(*(one.scores for one in finished))

    def order(one: Tried) -> float:
        return fmean(score for seed, score in one.scores.items() if not shared or seed in shared)

    return min(finished, key=order)


def _row(entry: Summary) -> list[str]:
    def cell(value: float | None, write: Any) -> str:
        return "" if value is None else write(value)

    finished, total = len(entry.best.scores), len(entry.best.scores) + entry.best.diverged
    return [
        entry.label,
        cell(entry.best.rate, lambda rate: f"{rate:g}") + EDGES[entry.edge] if entry.mean is not None else "",
        "diverged" if entry.mean is None else f"{entry.mean:.3f}",
        str(total) if finished == total else f"{finished} of {total}",
        cell(entry.spread, "{:.3f}".format),
        cell(entry.sd, "{:.4f}".format),
        cell(entry.bytes_per_weight, "{:.2f}".format),
        cell(entry.float_state_bytes, lambda size: human_bytes(size) if size else "none"),
        cell(entry.flip_rate, lambda share: percent(share, 2)),
        cell(entry.flip_back, lambda share: percent(share, 2)),
        cell(entry.zero_fraction, lambda share: f"{100 * share:.1f} %"),
        cell(entry.saturation, lambda share: percent(share, 2)),
        cell(entry.step_ms, significant),
    ]


def _means(entries: Iterable[Summary]) -> dict[Variant, float]:
    return {entry.variant: entry.mean for entry in entries if entry.mean is not None}


def _weights(entries: Iterable[Summary]) -> float | None:
    """The weights that a cell's rules train; of the own rule if it is there, for others may count gains as well."""
    known = sorted((not entry.own, entry.weights) for entry in entries if entry.weights is not None)
    return known[0][1] if known else None


def _without_dropout(variant: Variant) -> Variant:
    kept = {key: value for key, value in variant.values.items() if key != "dropout"}
    return replace(variant, settings=json.dumps(kept, sort_keys=True, ensure_ascii=False))


def _plain(text: str) -> str:
    """Text that cannot end a cell of a Markdown table or its line."""
    return " ".join(text.replace("|", "\\|").split())
