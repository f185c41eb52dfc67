"""The optimizer grid: six published rows at the published size, at untuned rates and at tuned ones, beside ours.

The model has 1,668,128 weights, as published, and not one more or less: width 176, depth 3, 288 symbols, and hashed
tables for pairs and triples of bytes with 1,283 entries each. Batch 64, context 66, 2500 steps, 250 of them warm-up.
All rows read the same batches. The rates of the published rows are not known: UNTUNED holds the usual defaults.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tritwise.bench.harness import Cell, load_parts
from tritwise.bench.tuning import tune
from tritwise.files import append_line, read_json_lines
from tritwise.score import ladder

WEIGHTS = 1_668_128
VOCAB = 288  # 256 bytes, and 32 symbols that no text uses
SHAPE: dict[str, Any] = {"vocab": VOCAB, "ngrams": 3, "ngram_rows": 1283}
GRID = Cell(
    rule="ours",
    rate=1.0,
    bench="optimizer-grid",
    width=176,
    depth=3,
    shape=SHAPE,
    steps=2500,
    batch=64,
    ctx=66,
    warmup=250,
    stride=33,
)
"""What all rows share; rule and rate are placeholders."""

UNTUNED = {
    "signsgd-c": 1e-3,
    "signsgd-e": 1e-3,
    "lion-bf16": 1e-4,
    "lion": 1e-4,
    "adamw-bf16": 1e-3,
    "adamw": 1e-3,
}
"""The published rows at rates that no one tuned."""

BESIDE: dict[str, dict[str, Any]] = {"ours": {"decay": 1.0}, "muon": {}}
"""Further rules, with what they have of their own: ours wants a rate that falls all the way."""


def grid_cells(
    base: Cell = GRID, settings: dict[str, Any] | None = None, rates: Sequence[float] | None = None
) -> list[Cell]:
    """Every row of the grid: the six at their untuned rates and tuned, ours and Muon tuned. None is there twice.

    settings: of ours. rates: to tune over, in place of each rule's own grid.
    """
    own = BESIDE | {"ours": BESIDE["ours"] | (settings or {})}
    rules = [*((rule, {}) for rule in UNTUNED), *own.items()]
    untuned = [cell for rule, rate in UNTUNED.items() for cell in tune(base, [(rule, {})], [rate])]
    return list({cell.key: cell for cell in [*untuned, *tune(base, rules, rates)]}.values())


def untuned_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the rows of a grid those at untuned rates."""
    return [row for row in rows if UNTUNED.get(row.get("rule", "")) == row.get("rate")]


def add_ladder(out: Path, cell: Cell) -> None:
    """Append the n-gram ladder of a cell's text to a file of rows, with chance over the model's symbols, unless there.

    The row is {"bench": "ladder", "data": …, "split": …, "rows": [{"name": …, "nats": …}, …]}.
    """
    vocab = cell.model_config().vocab
    about = {"bench": "ladder", "data": cell.data_name, "split": cell.split}
    before = read_json_lines(out) if out.exists() else []
    if any(about.items() <= row.items() and row.get("vocab") == vocab for row in before):
        return
    parts = load_parts(cell.data, cell.split, cell.batch, cell.ctx)
    rungs = [dict(row) for row in ladder(parts["train"], parts["val"], orders=(2, 3, 4, 5))]
    rungs[0] = {"name": f"uniform-{vocab}", "nats": math.log(vocab), "bpb": math.log2(vocab), "note": ""}
    append_line(out, {**about, "vocab": vocab, "rows": rungs})
