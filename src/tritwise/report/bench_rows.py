"""Rows of a benchmark, one JSON object a run, sorted into what can be compared: cells, variants of rules, trials.

A cell is what every rule of a comparison shares: data, shape of the model, steps and batch. A variant is a rule with
its settings and its schedule, which is tuned for it as its rate is. A trial is one run: a variant in a cell at one rate
with one seed. Nothing here is trusted: a row may lack any field, hold null, or come from a run that diverged and has no
score.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tritwise.errors import UserError
from tritwise.report.numbers import count, human_bytes, number
from tritwise.report.reader import mapping, read_lines, rows_of

OWN = "ours"
ROWS, LADDER = "rows.jsonl", "ladder"
SETUP = ("shape", "stride")
OF_RULE = ("column_scales", "group", "dropout")  # of a shape: of ternary layers alone, or chosen for each rule
DECAY = 0.5  # the usual share of the steps in which the rate falls, which goes without saying
UNIFORM = ("uniform", math.log(256))  # what a model pays for a byte it knows nothing about


@dataclass(frozen=True)
class Cell:
    """What the rules of one comparison have in common. A number that the row does not give is None."""

    bench: str
    data: str
    split: str
    steps: float | None
    batch: float | None
    ctx: float | None
    width: float | None
    depth: float | None
    setup: str  # the rest of what shapes a run, as sorted JSON: shape, stride

    @property
    def length(self) -> float | None:
        """Bytes seen in training: steps × batch × context."""
        known = [value for value in (self.steps, self.batch, self.ctx) if value is not None]
        return math.prod(known) if len(known) == 3 else None

    def title(self, weights: float | None = None) -> str:
        """The cell in words: enwik8 · width 512, depth 6, 19.1M weights · 3,600 steps of 64 × 512 bytes (118 MB)."""
        shape = [f"{name} {value:g}" for name in ("width", "depth") if (value := getattr(self, name)) is not None]
        shape += [_setting(key, value) for key, value in mapping(json.loads(self.setup).get("shape")).items()]
        shape += [f"{weights / 1e6:.3g}M weights"] if weights else []
        parts = [self.data or "text not named", ", ".join(shape)]
        if self.steps is not None:
            parts.append(f"{count(self.steps)} steps")
            if self.batch is not None and self.ctx is not None:
                parts[-1] += f" of {self.batch:g} × {self.ctx:g} bytes ({human_bytes(self.length or 0)})"
        return " · ".join(part for part in parts if part)


@dataclass(frozen=True)
class Variant:
    """A rule with its settings, as sorted JSON, and the type the model computed in.

    Among the settings is what is unusual in its schedule: "decay" unless it is 0.5, and "warmup" where most runs of the
    same cell have another; and what of the shape is the rule's own (`OF_RULE`).
    """

    rule: str
    settings: str
    dtype: str

    @property
    def own(self) -> bool:
        """Whether it is the project's own rule."""
        return self.rule == OWN

    @property
    def values(self) -> dict[str, Any]:
        """The settings as a dict."""
        return json.loads(self.settings)


@dataclass(frozen=True)
class Trial:
    """One run. `bpb` is None if it has no score: it diverged, or was cut off."""

    cell: Cell
    variant: Variant
    rate: float | None
    seed: float | None
    bpb: float | None
    row: Mapping[str, Any]


@dataclass
class Bench:
    """What a folder of benchmark rows holds."""

    trials: list[Trial] = field(default_factory=list)
    ladders: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def ladder(self, cell: Cell) -> list[tuple[str, float]]:
        """(name, nats per byte) of the ladder measured on the text of `cell`, the uniform model always among them."""
        found: dict[str, float] = {}
        for ladder in self.ladders:
            if ladder.get("data") == cell.data and ladder.get("split") in (None, cell.split):
                rungs = ((str(row.get("name")), number(row.get("nats"))) for row in rows_of(ladder.get("rows")))
                found.update({name: nats for name, nats in rungs if nats is not None and nats > 0})
        if not any(name.startswith(UNIFORM[0]) for name in found):
            found[UNIFORM[0]] = UNIFORM[1]
        return list(found.items())


def read_bench(*paths: Path) -> Bench:
    """Read .jsonl files of rows, or the `rows.jsonl` of folders, as one: later files count before earlier ones.

    Raises:
        UserError: there is no such file, or no row in them has a rule.
    """
    notes: list[str] = []
    rows: list[Mapping[str, Any]] = []
    for path in map(Path, paths):
        file = path / ROWS if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"{file} does not exist; give a folder that `tritwise bench` wrote")
        rows += read_lines(file, notes)
    bench = sort_rows(rows)
    bench.notes = notes + bench.notes
    if not bench.trials:
        told = " and ".join(map(str, paths))
        raise UserError(f"{told} holds no row with a rule; give a folder that `tritwise bench` wrote")
    return bench


def sort_rows(rows: Iterable[Mapping[str, Any]]) -> Bench:
    """Rows as trials and ladders. Of two rows of the same run, same seed and rate, the later one counts."""
    bench = Bench()
    trials: dict[tuple[Any, ...], Trial] = {}
    nameless, runs = 0, []
    warmups: dict[Cell, Counter[float]] = {}
    for row in rows:
        if row.get("bench") == LADDER:
            bench.ladders.append(dict(row))
        elif isinstance(row.get("rule"), str) and row["rule"]:
            cell, warmup = _cell(row), number(row.get("warmup"))
            runs.append((cell, warmup, row))
            if warmup is not None:
                warmups.setdefault(cell, Counter())[warmup] += 1
        else:
            nameless += 1
    for cell, warmup, row in runs:
        usual = warmups[cell].most_common(1)[0][0] if warmup is not None else None
        trial = _trial(cell, row, {} if warmup == usual else {"warmup": warmup})
        key = (trial.cell, trial.variant, trial.rate, trial.seed)
        trials.pop(key, None)
        trials[key] = trial
    bench.trials = list(trials.values())
    if nameless:
        bench.notes.append(f"{nameless} row{'s' * (nameless > 1)} without a rule left out")
    return bench


def labels(variants: Iterable[Variant]) -> dict[Variant, str]:
    """A name for each variant: its rule, and of its settings those in which it is unlike the rule's other variants."""
    known = list(dict.fromkeys(variants))
    made = {}
    for variant in known:
        family = [other for other in known if other.rule == variant.rule]
        telling = {key for other in family for key in _unlike(other.values, variant.values)}
        parts = [_setting(key, value) for key, value in variant.values.items() if key in telling]
        alike = [other for other in family if other.settings == variant.settings]
        parts += [variant.dtype] if len(alike) > 1 and variant.dtype else []
        made[variant] = f"{variant.rule} · {', '.join(parts)}" if parts else variant.rule
    return made


def differences(base: Variant, other: Variant) -> str:
    """In which settings `other` is unlike `base`, in words: "momentum 0.9, no scales"."""
    theirs = other.values
    parts = [
        _setting(key, theirs[key]) if key in theirs else f"without {key}" for key in _unlike(base.values, other.values)
    ]
    parts += [other.dtype] if other.dtype != base.dtype else []
    return ", ".join(parts)


def default_variant(trials: Sequence[Trial], best: Mapping[Variant, float]) -> Variant | None:
    """The variant of the own rule that stands for it, or None if there is no row of it.

    It is the one measured in most cells; among several the one that the others differ from in the fewest settings,
    since an ablation changes one thing at a time; then the one with the fewest settings, then the lowest in `best`.
    """
    cells: dict[Variant, set[Cell]] = {}
    for trial in trials:
        if trial.variant.own:
            cells.setdefault(trial.variant, set()).add(trial.cell)

    def order(variant: Variant) -> tuple[float, ...]:
        distance = sum(len(_unlike(variant.values, other.values)) + (variant.dtype != other.dtype) for other in cells)
        return -len(cells[variant]), distance, len(variant.values), best.get(variant, math.inf)

    return min(cells, key=order, default=None)


def richest_cell(trials: Iterable[Trial], own_only: bool = False) -> Cell | None:
    """The cell in which the most rules were measured; among several the one with the most variants, runs, bytes."""
    variants: dict[Cell, set[Variant]] = {}
    runs: Counter[Cell] = Counter()
    for trial in trials:
        if trial.variant.own or not own_only:
            variants.setdefault(trial.cell, set()).add(trial.variant)
            runs[trial.cell] += 1

    def size(cell: Cell) -> tuple[float, ...]:
        rules = {variant.rule for variant in variants[cell]}
        return len(rules), len(variants[cell]), runs[cell], cell.length or 0

    return max(variants, key=size, default=None)


def _cell(row: Mapping[str, Any]) -> Cell:
    bench, data, split = (row[key] if isinstance(row.get(key), str) else "" for key in ("bench", "data", "split"))
    sizes = {key: number(row.get(key)) for key in ("steps", "batch", "ctx", "width", "depth")}
    told = {key: row[key] for key in SETUP if row.get(key) is not None}
    if "shape" in told:
        told["shape"] = {key: value for key, value in mapping(told["shape"]).items() if key not in OF_RULE}
    setup = json.dumps(told, sort_keys=True, ensure_ascii=False)
    return Cell(bench, data, split, **sizes, setup=setup)


def _trial(cell: Cell, row: Mapping[str, Any], schedule: Mapping[str, Any]) -> Trial:
    decay = number(row.get("decay"))
    scales = {key: value for key, value in mapping(row.get("shape")).items() if key in OF_RULE}
    told = {
        **mapping(row.get("settings")),
        **scales,
        **schedule,
        **({} if decay in (None, DECAY) else {"decay": decay}),
    }
    settings = json.dumps(told, sort_keys=True, ensure_ascii=False)
    dtype = row["dtype"] if isinstance(row.get("dtype"), str) else ""
    bpb, nats = number(row.get("val_bpb")), number(row.get("val_nats"))
    bpb = nats / math.log(2) if bpb is None and nats is not None else bpb
    variant = Variant(row["rule"], settings, dtype)
    scored = bpb if bpb is not None and bpb > 0 else None
    return Trial(cell, variant, number(row.get("rate")), number(row.get("seed")), scored, row)


def _unlike(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    missing = object()
    return sorted(key for key in a.keys() | b.keys() if a.get(key, missing) != b.get(key, missing))


def _setting(key: str, value: object) -> str:
    name = key.replace("_", " ")
    if isinstance(value, bool):
        return name if value else f"no {name}"
    if value is None:
        return f"no {name}"
    return f"{name} {value:g}" if isinstance(value, int | float) else f"{name} {value}"
