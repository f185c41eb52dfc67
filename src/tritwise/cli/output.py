"""What commands print: tables for people on stdout, or, with --json, one JSON object on its last line."""

import json
import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from tritwise.files import finite


def console(as_json: bool) -> Console:
    """Where a command talks to a person: stdout, or stderr when stdout belongs to JSON."""
    return Console(stderr=as_json, highlight=False, soft_wrap=True)


def print_json(value: dict[str, Any]) -> None:
    """One line of strict JSON; a number that is none becomes null."""
    print(json.dumps(finite(value), ensure_ascii=False))


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A table whose first column is text and whose others are numbers, set to the right."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left")
    for row in rows:
        made.add_row(*row)
    return made


def narrow_table(title: str, shown: Sequence[str], columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The `shown` of a table's columns, those that a terminal has room for; a file beside it has them all."""
    keep = [columns.index(name) for name in shown if name in columns]
    return table(title, [columns[at] for at in keep], [[row[at] for at in keep] for row in rows])


def score_table(name: str, nats: float, ladder: list[dict[str, Any]]) -> Table:
    """The model among the rungs of the ladder, from worst to best."""
    rungs = [(str(row["name"]), float(row["nats"])) for row in ladder] + [(name, nats)]
    rows = [
        [f"[bold]{rung}[/bold]" if rung == name else rung, f"{value:.4f}", f"{value / math.log(2):.4f}"]
        for rung, value in sorted(rungs, key=lambda entry: -entry[1])
    ]
    return table("", ["", "nats/byte", "bits/byte"], rows)


def averaged_rows(averaged: dict[str, Any] | None) -> list[list[str]]:
    """Of a run with a mean of its weights: the score of the mean beside that of the last weights, and which ships."""
    if averaged is None:
        return []
    of = f" of {averaged['count']} moments" if "count" in averaged else ""
    rows = [[f"mean{of}", f"{averaged['bpb']:.4f} bits per byte"]]
    rows.append(["last weights", f"{averaged['bpb_unaveraged']:.4f} bits per byte"])
    rows[not averaged["shipped"]][1] += ", ships"
    return rows


def media_table(val: dict[str, dict[str, Any]]) -> Table:
    """What an ARB run reached on val, a row for each figure of each kind; a dict in the figures is a row of its own."""
    rows = []
    for kind, figures in val.items():
        for name, figure in figures.items():
            told = figure if isinstance(figure, dict) else {"": figure}
            words = [f"{key} {value:.4g}".strip() for key, value in told.items()]
            rows.append([f"{kind}: {name}", ", ".join(words)])
    return table("val", ["figure", ""], rows)
