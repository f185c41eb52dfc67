"""What the engine does, from the files of `tritwise bench step` and `bench capacity`: ours beside AdamW in bfloat16."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tritwise.report.bench_markdown import markdown
from tritwise.report.numbers import human_bytes, number, percent, significant
from tritwise.report.reader import mapping, rows_of

OWN, RIVAL = "ours", "adamw-bf16"
HEAD = (
    "weights",
    "settings",
    "bytes a step",
    "ours, ms",
    "AdamW, ms",
    "speed over AdamW",
    "turns",
    "update's share",
    "state, ours",
    "AdamW",
    "peak, ours",
    "AdamW",
)


def engine_markdown(files: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of the models that ours took steps with, smallest first, then by the bytes of a step and the
    default settings before others, and on what; AdamW in bfloat16 beside it where the same file has it."""
    found = sorted((row for file in files for row in _rows(file)), key=lambda row: row[:3])
    if not found:
        return "Nothing has been measured yet."
    devices = sorted({str(file["device"]) for file in files if file.get("device")})
    torches = sorted({str(file["torch"]) for file in files if file.get("torch")})
    where = f"One {' or '.join(devices)}, torch {' and '.join(torches)}"
    told = f"{where}, bfloat16 activations; medians of as many turns as are told, in one run."
    return f"{told}\n\n{markdown(HEAD, [cells for *_, cells in found])}"


def capacity_markdown(file: Mapping[str, Any]) -> str:
    """A sentence: the largest model of each contender of `bench capacity`, and the memory that it had."""
    found = [(row, mapping(row.get("largest"))) for row in rows_of(file.get("rows"))]
    largest = [(row, most, weights) for row, most in found if (weights := number(most.get("weights"))) is not None]
    if not largest:
        return "Nothing has been measured yet."
    told = []
    for row, most, weights in largest:
        peak, fails = number(most.get("peak_bytes")), number(row.get("fails"))
        beside = [f"{human_bytes(peak)} at its peak"] if peak else []
        beside += [f"{_size(fails)} do not fit"] if fails else []
        size = f"**{_size(weights)}** weights with {row.get('contender')}"
        told.append(f"{size} ({', '.join(beside)})" if beside else size)
    room = number(file.get("room"))
    return f"The largest model whose loss falls in {human_bytes(room) if room else 'the memory'}: {', '.join(told)}."


def _rows(file: Mapping[str, Any]) -> Iterator[tuple[float, float, int, list[str]]]:
    rows = [row for row in rows_of(file.get("rows")) if not row.get("error")]
    rival = next((row for row in rows if row.get("contender") == RIVAL), {})
    for ours in rows:
        weights, settings = number(ours.get("weights")), mapping(ours.get("settings"))
        if ours.get("rule") == OWN and weights is not None and ours.get("step_ms") is not None:
            read = number(ours.get("bytes_a_step")) or 0.0
            yield weights, read, len(settings), _cells(weights, ours, rival)


def _cells(weights: float, ours: Mapping[str, Any], rival: Mapping[str, Any]) -> list[str]:

    def cell(row: Mapping[str, Any], key: str, write: Any) -> str:
        value = number(row.get(key))
        return "" if value is None else write(value)

    times = [cell(row, "step_ms", significant) for row in (ours, rival)]
    ratio = cell(ours, "ratio", "{:.2f}".format) if rival else ""
    sizes = [cell(row, key, human_bytes) for key in ("state_bytes", "peak_bytes") for row in (ours, rival)]
    share = cell(ours, "update_share", lambda value: percent(value, 2) if value else "")
    read, rounds = cell(ours, "bytes_a_step", "{:,.0f}".format), ours.get("step_ms_rounds")
    turns = str(len(rounds)) if isinstance(rounds, list) else ""
    return [_size(weights), _settings(mapping(ours.get("settings"))), read, *times, ratio, turns, share, *sizes]


def _settings(settings: Mapping[str, Any]) -> str:
    """As `--set` takes them; those of single roles are left out."""
    shown = [f"{name}={str(settings[name]).lower()}" for name in ("interval", "fp8", "compact") if name in settings]
    return ", ".join(shown) or "default"


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
