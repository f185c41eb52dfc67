"""Cells of a comparison: every rule over its grid of rates with one seed, then more seeds at the best rate of each.

Tables of rows are in `tritwise.report.bench_tables`; here it is only decided what to run.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from tritwise.bench.harness import Cell
from tritwise.bench.rules import SCHEDULE, rule_called


def tune(base: Cell, rules: Iterable[tuple[str, dict[str, Any]]], rates: Sequence[float] | None = None) -> list[Cell]:
    """`base` for each (rule, settings) at every rate of the rule's grid, or of `rates` where the rule has a rate.

    What of SCHEDULE stands among the settings goes to the cell, and a list under "rates" in the place of `rates`.
    """
    cells = []
    for rule, given in rules:
        grid, settings = rule_called(rule).grid, dict(given)
        own = settings.pop("rates", rates)
        schedule = {key: settings.pop(key) for key in SCHEDULE if key in settings}
        for rate in own if own and len(grid) > 1 else grid:
            cells.append(replace(base, rule=rule, settings=settings, rate=rate, **schedule))
    return cells


def further_seeds(cells: Sequence[Cell], rows: Iterable[dict[str, Any]], seeds: int) -> list[Cell]:
    """The best of `cells` in each variant (rule and settings) with the seeds that follow its own, `seeds` in all.

    rows: of `cells`, by key. The best has the lowest val bpb; a variant without a score gets no further seeds.
    """
    scores = {row["key"]: row["val_bpb"] for row in rows if row["val_bpb"] is not None}
    best: dict[str, Cell] = {}
    for cell in cells:
        variant = replace(cell, rate=1.0).key
        if cell.key in scores and (variant not in best or scores[cell.key] < scores[best[variant].key]):
            best[variant] = cell
    return [replace(cell, seed=cell.seed + more) for cell in best.values() for more in range(1, seeds)]
