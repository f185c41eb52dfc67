"""Time and memory of a training step, from the files of `tritwise bench step`: ours beside AdamW, a row a model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tritwise.report.bench_markdown import markdown
from tritwise.report.numbers import human_bytes, number, percent, significant
from tritwise.report.reader import mapping, rows_of

OWN, RIVAL = "ours", "adamw-bf16"
HEAD = (
    "weights",
    "bytes a step",
    "ours, ms",
    "AdamW, ms",
    "speed over AdamW",
    "update's share",
    "state, ours",
    "AdamW",
    "peak, ours",
    "AdamW",
)


def engine_markdown(files: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of the models that ours took steps with, smallest first, and on what; AdamW in bfloat16 beside
    it where the same file has it."""
    found = sorted((row for file in files for row in _rows(file)), key=lambda row: row[0])
    if not found:
        return "Nothing has been measured yet."
    devices = sorted({str(file["device"]) for file in files if file.get("device")})
    torches = sorted({str(file["torch"]) for file in files if file.get("torch")})
    where = f"One {' or '.join(devices)}, torch {' and '.join(torches)}"
    told = f"{where}, bfloat16 activations; medians, in turns in one run."
    return f"{told}\n\n{markdown(HEAD, [cells for _, cells in found])}"


def _rows(file: Mapping[str, Any]) -> Iterator[tuple[float, list[str]]]:
    rows = {row.get("contender"): row for row in rows_of(file.get("rows")) if not row.get("error")}
    ours, rival = rows.get(OWN), mapping(rows.get(RIVAL))
    if ours is None or (weights := number(ours.get("weights"))) is None:
        return

    def cell(row: Mapping[str, Any], key: str, write: Any) -> str:
        value = number(row.get(key))
        return "" if value is None else write(value)

    times = [cell(row, "step_ms", significant) for row in (ours, rival)]
    ratio = cell(ours, "ratio", "{:.2f}".format) if rival else ""
    sizes = [cell(row, key, human_bytes) for key in ("state_bytes", "peak_bytes") for row in (ours, rival)]
    share = cell(ours, "update_share", lambda value: percent(value, 2) if value else "")
    read = cell(ours, "bytes_a_step", "{:,.0f}".format)
    yield weights, [_size(weights), read, *times, ratio, share, *sizes]


def _size(weights: float) -> str:
    return f"{weights / 1e9:.3g}B" if weights >= 1e9 else f"{weights / 1e6:.3g}M"


def newest_of_each(files: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
    """Of (name, file) the last of each model size and batch, so that a size measured again stands there once."""
    kept: dict[Any, Mapping[str, Any]] = {}
    for _, file in sorted(files, key=lambda pair: pair[0]):
        rows = rows_of(file.get("rows"))
        if rows:
            kept[(rows[0].get("size"), rows[0].get("bytes_a_step"))] = file
    return list(kept.values())
