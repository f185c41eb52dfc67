"""What a person sees during training: a live line on a terminal, plain lines elsewhere, nothing when quiet."""

import math
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


class Display(Protocol):
    """Told by the loop what happens.

    start: `done` of at most `total` steps, which end after `seconds` unless these are 0.
    record: a line of metrics.jsonl, or, of kind "memory", bytes by role.
    """

    def start(self, done: int, total: int, seconds: float = 0.0) -> None: ...

    def record(self, record: dict[str, Any]) -> None: ...

    def say(self, message: str) -> None: ...

    def stop(self) -> None: ...


class Quiet:
    """Shows nothing."""

    def start(self, done: int, total: int, seconds: float = 0.0) -> None: ...

    def record(self, record: dict[str, Any]) -> None: ...

    def say(self, message: str) -> None: ...

    def stop(self) -> None: ...


def _clock(seconds: float) -> str:
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def _amount(rate: float) -> str:
    """12.3k, 4.5M: bytes per second."""
    if rate >= 1e6:
        return f"{rate / 1e6:.2f}M"
    return f"{rate / 1e3:.1f}k" if rate >= 1e3 else f"{rate:.0f}"


def _size(count: float) -> str:
    """812 B, 12.3 kB, 4.56 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _losses(record: dict[str, Any]) -> dict[str, str]:
    """The losses of a "train" line: the mean, for text its bits per byte, of a mixture that of every kind."""
    told = {"loss": record["loss"]} | ({"bpb": record["bpb"]} if "bpb" in record else {}) | record.get("losses", {})
    return {name: f"{value:.3f}" for name, value in told.items()}


def evaluation(record: dict[str, Any]) -> str:
    """An "eval" line for people."""
    of = "" if record.get("of", "text") == "text" else f"{record['of']} "
    told = [(f"val {name}", record[name]) for name in ("loss", "bpb", "exact", "cer") if name in record]
    return f"step {record['step']:>6}  " + "  ".join(f"{of}{name} {value:.4f}" for name, value in told)


def sizing(record: dict[str, Any]) -> str:
    """A "size" line for people."""
    over = "" if record["bytes"] <= record["budget"] else ", too many"
    return f"step {record['step']:>6}  {record['bytes']:,} bytes when shipped, of {record['budget']:,}{over}"


def memory_cells(record: dict[str, Any]) -> dict[str, str]:
    """Role -> how much memory, for people: the roles of `train.memory.memory_by_role` that hold anything."""
    return {role: _size(count) for role, count in record.items() if role != "kind" and count}


class PlainLines:
    """One line for every record, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self.console, self.total, self.seconds = console, 0, 0.0
        self._per_step: float | None = None

    def start(self, done: int, total: int, seconds: float = 0.0) -> None:
        self.total, self.seconds = total, seconds

    def record(self, record: dict[str, Any]) -> None:
        if record["kind"] == "train":
            left = record["step_seconds"] * (self.total - record["step"])
            if self.seconds:
                left = min(left, self.seconds - record["seconds"])
            losses = "  ".join(f"{name} {value}" for name, value in _losses(record).items())
            of = "" if self.seconds else f"/{self.total}"  # by the clock steps are as many as there is time for
            line = f"step {record['step']:>6}{of}  {losses}"
            line += f"  {_amount(record['bytes_per_second'])} B/s"
            if record.get("flips") is not None:
                line += f"  flips {record['flips']:.0f}  zeros {record['zero_fraction']:.1%}"
            if record["skipped"]:
                line += f"  skipped {record['skipped']}"
            self.say(f"{line}  left {_clock(left)}")
        elif record["kind"] == "memory":
            self.say("memory  " + "  ".join(f"{role} {size}" for role, size in memory_cells(record).items()))
        elif record["kind"] == "eval":
            self.say(evaluation(record))
        elif record["kind"] == "size":
            self.say(sizing(record))

    def say(self, message: str) -> None:
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None: ...


class LiveLine:
    """A bar with the newest numbers, redrawn in place; messages and evaluations scroll by above it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.bar.add_task("", total=1)
        self.total, self.seconds = 1, 0.0
        self.live = Live(self.bar, console=console, refresh_per_second=4, transient=True)
        self.best = math.inf
        self.memory: dict[str, str] = {}

    def start(self, done: int, total: int, seconds: float = 0.0) -> None:
        self.total, self.seconds = total, seconds
        self._advance(done, 0.0)
        self.live.start()

    def _advance(self, step: int, seconds: float) -> None:
        """The bar at a step, so many seconds in; by the clock where that ends the run, which has no number of steps."""
        if self.seconds:
            said = f"step {step}, {seconds:.0f} of {self.seconds:.0f} s"
            self.bar.update(self.task, description=said, total=self.seconds, completed=seconds)
        else:
            self.bar.update(self.task, description=f"step {step}/{self.total}", total=self.total, completed=step)

    def record(self, record: dict[str, Any]) -> None:
        if record["kind"] == "train":
            self._advance(record["step"], record.get("seconds", 0.0))
            cells = _losses(record) | {"bytes/s": _amount(record["bytes_per_second"])}
            if record.get("flips") is not None:
                cells["flips/step"] = f"{record['flips']:.0f}"
                cells["zeros"] = f"{record['zero_fraction']:.1%}"
            if record["skipped"]:
                cells["skipped"] = str(record["skipped"])
            if math.isfinite(self.best):
                cells["best val bpb"] = f"{self.best:.4f}"
            page = Table.grid()
            page.add_row(self.bar)
            for row in (cells, self.memory):
                if row:
                    page.add_row("  ".join(f"[dim]{name}[/dim] [bold]{value}[/bold]" for name, value in row.items()))
            self.live.update(page)
        elif record["kind"] == "memory":
            self.memory = memory_cells(record)
        elif record["kind"] == "eval":
            self.best = min(self.best, record.get("bpb", math.inf))
            self.say(evaluation(record))
        elif record["kind"] == "size":
            self.say(sizing(record))

    def say(self, message: str) -> None:
        self.live.console.print(message, markup=False, highlight=False)

    def stop(self) -> None:
        self.live.stop()


def make_display(console: Console) -> Display:
    """Live on a terminal, plain lines elsewhere."""
    return LiveLine(console) if console.is_terminal else PlainLines(console)
