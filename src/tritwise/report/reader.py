"""A run folder as plain lists and dicts, with a note for whatever is missing or unreadable.

The reader trusts nothing: a run may be unfinished, cut off in the middle of a line, copied in part or written by
hand. Every figure is checked to be a finite number when it is used (`series`, `number`), so the plots and the page
never meet a NaN.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tritwise.errors import UserError
from tritwise.files import read_bytes, read_json
from tritwise.report.numbers import number

FORMAT = 1
REGISTER_BINS = 243  # registers −121…121
JSON_FILES = (
    "config.json",
    "manifest.json",
    "ladder.json",
    "audit.json",
    "histogram.json",
    "result.json",
    "confusion.json",
)


@dataclass
class Run:
    """What a run folder holds. Dicts are as written by the run; rows are in order of `step`, one row a step."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    ladder: list[dict[str, Any]] = field(default_factory=list)  # name, nats, bpb: all three present and finite
    ladder_bytes: float | None = None
    audit: dict[str, Any] = field(default_factory=dict)
    histogram: dict[str, list[float]] = field(default_factory=dict)  # layer name -> 243 counts
    histogram_step: float | None = None
    result: dict[str, Any] = field(default_factory=dict)
    train: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    media: list[dict[str, Any]] = field(default_factory=list)  # evaluations of every kind of an ARB run
    examples: list[dict[str, Any]] = field(default_factory=list)
    pictures: list[dict[str, Any]] = field(default_factory=list)
    confusion: dict[str, Any] = field(default_factory=dict)  # names, counts: whole numbers, one column more than rows
    folder: Path = Path()
    notes: list[str] = field(default_factory=list)


def read_run(folder: Path) -> Run:
    """Read `folder`.

    Raises:
        UserError: the folder does not exist, is a file, cannot be read, or holds none of the files of a run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a run folder" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}; give the folder that `tritwise train --out` wrote")
    run = Run(name=folder.resolve().name or str(folder), folder=folder)
    found = {name: content for name in JSON_FILES if (content := _read_object(folder, name, run.notes)) is not None}
    has_metrics = _read_metrics(folder / "metrics.jsonl", run)
    if not found and not has_metrics:
        detail = f" ({run.notes[0]})" if run.notes else ""
        raise UserError(
            f"{folder} is not a run folder: it holds no metrics.jsonl, config.json or result.json{detail}; "
            "give the folder that `tritwise train --out` wrote"
        )
    run.config, run.manifest = found.get("config.json", {}), found.get("manifest.json", {})
    run.audit, run.result = found.get("audit.json", {}), found.get("result.json", {})
    _take_ladder(found.get("ladder.json", {}), run)
    _take_histogram(found.get("histogram.json", {}), run)
    _take_confusion(found.get("confusion.json", {}), run)
    version = number(run.config.get("format"))
    if version is not None and version > FORMAT:
        run.notes.append(
            f"config.json has format {version:g}, newer than the {FORMAT} this report knows: "
            "something may be missing; update Tritwise"
        )
    return run


def series(rows: Iterable[dict[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    """The pairs (row[x], row[y]) in which both are finite numbers, as two lists."""
    pairs = [(number(row.get(x)), number(row.get(y))) for row in rows]
    kept = [(a, b) for a, b in pairs if a is not None and b is not None]
    return [a for a, _ in kept], [b for _, b in kept]


def layer_series(rows: Iterable[dict[str, Any]], x: str, y: str) -> dict[str, tuple[list[float], list[float]]]:
    """`series` for each layer of the rows of kind "layers", in the order in which the layers first appear."""
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in mapping(row.get("layers")))
    lines = {}
    for name in names:
        points = [{x: row.get(x), y: mapping(mapping(row.get("layers")).get(name)).get(y)} for row in rows]
        xs, ys = series(points, x, y)
        if xs:
            lines[name] = (xs, ys)
    return lines


def mapping(value: object) -> dict[str, Any]:
    """`value` if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def rows_of(value: object) -> list[dict[str, Any]]:
    """The JSON objects of a JSON array; empty for anything else."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The JSON objects in the lines of a .jsonl file; none if there is no file. `notes` is told what is left out."""
    if not path.exists():
        return []
    try:
        lines = read_bytes(path).split(b"\n")
    except UserError as error:
        notes.append(f"{path.name} is left out: {_detail(error, path)}")
        return []
    rows: list[dict[str, Any]] = []
    broken = 0
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8", "replace"))
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif index == len(lines) - 1:  # no newline after it: the run was cut off, or is writing it now
            notes.append(f"The last line of {path.name} was cut short and is left out")
        else:
            broken += 1
    if broken:
        notes.append(f"{broken} line{'s' * (broken > 1)} of {path.name} left out: not a JSON object")
    return rows


def _read_object(folder: Path, name: str, notes: list[str]) -> dict[str, Any] | None:
    path = folder / name
    if not path.exists():
        return None
    try:
        content = read_json(path)
    except UserError as error:
        notes.append(f"{name} is left out: {_detail(error, path)}")
        return None
    if not isinstance(content, dict):
        notes.append(f"{name} is left out: it is not a JSON object")
        return None
    return content


def _detail(error: UserError, path: Path) -> str:
    """The error without the folder's path, which is nobody's business on a page that is sent around."""
    return str(error).replace(str(path), path.name)


def _read_metrics(path: Path, run: Run) -> bool:
    """Sort the lines of metrics.jsonl by kind. Returns whether there was at least one."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for row in read_lines(path, run.notes):
        by_kind.setdefault(str(row.get("kind")), []).append(row)
    run.train, run.layers = _by_step(by_kind.get("train", [])), _by_step(by_kind.get("layers", []))
    evals = [row for row in by_kind.get("eval", []) if row.get("split", "val") == "val"]
    run.evals = _by_step(row for row in evals if row.get("of", "text") == "text")
    kinds = dict.fromkeys(str(row["of"]) for row in evals if "of" in row)
    run.media = [row for kind in kinds for row in _by_step(row for row in evals if row.get("of") == kind)]
    run.examples, run.pictures = by_kind.get("example", []), _by_step(by_kind.get("picture", []))
    run.samples, run.events = by_kind.get("sample", []), by_kind.get("event", [])
    return bool(by_kind)


def _by_step(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a step, the last written: a resumed run may repeat steps that it had already logged."""
    last = {step: row for row in rows if (step := number(row.get("step"))) is not None}
    return [last[step] for step in sorted(last)]


def _take_ladder(content: dict[str, Any], run: Run) -> None:
    rows = rows_of(content.get("rows"))
    run.ladder = [
        row for row in rows if all((number(row.get(key)) or 0) > 0 for key in ("nats", "bpb")) and "name" in row
    ]
    run.ladder_bytes = number(content.get("bytes"))
    if len(run.ladder) < len(rows):
        run.notes.append("rows of ladder.json without a name, nats and bpb are left out")


def _take_confusion(content: dict[str, Any], run: Run) -> None:
    names, counts = content.get("names"), content.get("counts")
    if isinstance(names, list) and isinstance(counts, list) and names and len(counts) == len(names):
        rows = [row for row in counts if isinstance(row, list) and len(row) == len(names) + 1]
        if len(rows) == len(names) and all(isinstance(cell, int) and cell >= 0 for row in rows for cell in row):
            run.confusion = {"names": [str(name) for name in names], "counts": rows}


def _take_histogram(content: dict[str, Any], run: Run) -> None:
    run.histogram_step = number(content.get("step"))
    layers = mapping(content.get("layers"))
    for name, counts in layers.items():
        values = [number(count) for count in counts] if isinstance(counts, list) else []
        good = [value for value in values if value is not None and value >= 0]
        if len(good) == len(values) == REGISTER_BINS:
            run.histogram[name] = good
    if len(run.histogram) < len(layers):
        run.notes.append(f"layers of histogram.json without {REGISTER_BINS} counts are left out")
