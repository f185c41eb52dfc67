"""Each rule of a benchmark at its best rate, and the table of them; in Markdown: bench_markdown.py."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

from tritwise.report.bench_rows import (
    Bench,
    Cell,
    Trial,
    Variant,
    labels,
    sort_rows,
)
from tritwise.report.numbers import human_bytes, number, percent, significant

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
    cells = [cells_of(entry) for entry in summaries]
    keep = [column for column in range(len(HEAD)) if column < 4 or any(row[column] for row in cells)]
    return [HEAD[column] for column in keep], [[row[column] for column in keep] for row in cells]


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
    devices = {str(trial.row.get("device") or "") for trial in runs}

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
        device=devices.pop() if len(devices) == 1 else "",
    )


def _best(tried: Sequence[Tried]) -> Tried:
    finished = [one for one in tried if one.scores and not one.diverged] or [one for one in tried if one.scores]
    if not finished:
        return tried[0]
    shared = set(finished[0].scores).intersection(*(one.scores for one in finished))

    def order(one: Tried) -> float:
        return fmean(score for seed, score in one.scores.items() if not shared or seed in shared)

    return min(finished, key=order)


def weights_of(entries: Iterable[Summary]) -> float | None:
    """The weights that a cell's rules train; of the own rule if it is there, for others may count gains as well."""
    known = sorted((not entry.own, entry.weights) for entry in entries if entry.weights is not None)
    return known[0][1] if known else None


def cells_of(entry: Summary) -> list[str]:
    """A summary as text, one cell for each of HEAD; empty where nothing is known."""

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
