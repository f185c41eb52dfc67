"""What `tritwise bench true-ternary` prints: losses as they come, then tables of results, phases and state."""

from typing import Any

from rich.console import Console
from rich.table import Table

from tritwise.bench.phases import PHASES


def show_loss(console: Console | None, step: int, steps: int, loss: float) -> None:
    """One line for the mean loss since the last line."""
    if console is not None:
        console.print(f"  step {step:>5}/{steps}  loss {loss:.4f}", highlight=False)


def show_result(console: Console, result: dict[str, Any]) -> None:
    """The tables of a result that `true_ternary.run` returned."""
    rows, settings = result["rows"], result["settings"]
    said = (
        f"{settings['steps']} steps of {settings['batch']} x {settings['ctx']} bytes of {settings['data']}, "
        f"{rows[0]['weights']:,} weights, {settings['device']}"
    )
    console.print(said, highlight=False)
    if not settings["updates"]:
        console.print("nothing was updated: forward and backward alone")
    console.print(_losses(rows, result["ladder"]["rows"]))
    console.print(_phases(rows))
    console.print(_state(rows, result["projected_3b"]))
    console.print(_transient(rows))
    if result["measured_3b"] is not None:
        console.print(_measured(result["measured_3b"]), highlight=False)


def _losses(rows: list[dict[str, Any]], ladder: list[dict[str, Any]]) -> Table:
    """Rows and rungs of the ladder, from the worst val loss to the best."""
    table = _table("loss, nats per byte", "val", "last step", "lowest", "last mean", "rate", "step ms")
    lines = [(rung["nats"], [rung["name"], f"{rung['nats']:.3f}"] + [""] * 5) for rung in ladder]
    for row in rows:
        name = f"[bold]{row['rule']}[/bold]{' (reused)' if row['reused'] else ''}"
        numbers = [row[key] for key in ("val_nats", "final_loss", "min_loss", "final_loss_mean")]
        cells = ["diverged" if number is None else f"{number:.3f}" for number in numbers]
        order = float("inf") if row["val_nats"] is None else row["val_nats"]
        lines.append((order, [name, *cells, f"{row['rate']:g}", f"{row['step_ms']:.1f}"]))
    for _, cells in sorted(lines, key=lambda line: -line[0]):
        table.add_row(*cells)
    return table


def _phases(rows: list[dict[str, Any]]) -> Table:
    table = _table("median ms a step", *PHASES, "all")
    for row in rows:
        table.add_row(row["rule"], *(f"{row['phases_ms'][phase]:.1f}" for phase in PHASES), f"{row['step_ms']:.1f}")
    return table


def _state(rows: list[dict[str, Any]], projected: dict[str, int]) -> Table:
    """What lasts from step to step, by what it holds, and what three billion weights would take."""
    table = _table("state in MB, and bytes a weight", "weights", "scales", "momentum", "a weight", "float", "GB at 3B")
    for row in rows:
        table.add_row(
            row["rule"],
            *(f"{row[key] / 1e6:.2f}" for key in ("weight_bytes", "scale_bytes", "momentum_bytes")),
            f"{row['bytes_per_weight']:.3f}",
            f"{row['float_state_bytes'] / row['weights']:.3f}",
            f"{projected[row['rule']] / 1e9:.2f}",
        )
    return table


def _transient(rows: list[dict[str, Any]]) -> Table:
    """Gradients held at one time, and the most that the run held at any moment over what was there before it."""
    table = _table("memory of a run, MB", "gradients", "peak")
    for row in rows:
        peak = "unknown" if row["peak_growth"] is None else f"{row['peak_growth'] / 1e6:.0f}"
        table.add_row(row["rule"], f"{row['gradient_bytes'] / 1e6:.2f}", peak)
    return table


def _measured(found: dict[str, Any]) -> str:
    if not found["measured"]:
        return f"state of a model of {found['weights']:,} weights not measured: {found['reason']}"
    growth = found["resident_growth"]
    held = "" if growth is None else f"; memory held after the step grew by {growth / 1e9:.2f} GB"
    peak = "" if found["peak_growth"] is None else f", at its peak by {found['peak_growth'] / 1e9:.2f} GB"
    return (
        f"true-ternary at {found['weights']:,} weights, one whole training step: {found['state_bytes']:,} bytes of "
        f"state, {found['bytes_per_weight']:.4f} a weight, {found['float_state_bytes']} of them float{held}{peak} "
        f"({sum(found['seconds'].values()):.0f} s)"
    )


def _table(title: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left", title_style="bold")
    made.add_column("", min_width=12)
    for column in columns:
        made.add_column(column, justify="right")
    return made
