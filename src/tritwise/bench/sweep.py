"""Many cells: one after another on one device, or side by side, a process for each device; resumed by what is on file.

A row is appended to the file as soon as it is there. A cell whose run fails is reported and the others go on.
"""

import datetime
import gc
import multiprocessing
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tritwise.bench.harness import Cell, Tell, load_parts, run_cell
from tritwise.errors import UserError
from tritwise.files import JsonLines, make_folder, read_json_lines


@dataclass
class Sweep:
    """What came of the cells: a row for each that ran, now or before, and the others with what went wrong."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[tuple[Cell, str]] = field(default_factory=list)


class SweepDisplay(Protocol):
    """Told how a sweep goes on. `place` tells the runs apart that go on side by side."""

    def start(self, cells: int, steps: int) -> None: ...

    def at(self, place: int, cell: Cell, done: int) -> None: ...

    def finished(self, place: int, cell: Cell, told: str) -> None: ...

    def stop(self) -> None: ...


class QuietSweep:
    """Shows nothing."""

    def start(self, cells: int, steps: int) -> None: ...

    def at(self, place: int, cell: Cell, done: int) -> None: ...

    def finished(self, place: int, cell: Cell, told: str) -> None: ...

    def stop(self) -> None: ...


class SweepLines:
    """A line for every finished run with the time that is left, and on a terminal a bar below them."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None)
        self._running: dict[int, int] = {}
        self._cells = self._ended = self._steps = self._done = 0
        self._began = 0.0

    def start(self, cells: int, steps: int) -> None:
        self._cells, self._steps, self._began = cells, steps, time.monotonic()
        self._ended = self._done = 0
        self._bar.update(self._task, total=steps, completed=0)
        self._bar.start()

    def at(self, place: int, cell: Cell, done: int) -> None:
        self._running[place] = done
        completed = self._done + sum(self._running.values())
        self._bar.update(self._task, completed=completed, description=f"{self._ended}/{self._cells} runs  {name(cell)}")

    def finished(self, place: int, cell: Cell, told: str) -> None:
        self._running.pop(place, None)
        self._done, self._ended = self._done + cell.steps, self._ended + 1
        line = f"[{self._ended}/{self._cells}] {name(cell)}  {told}"
        if left := self._steps - self._done:
            seconds = (time.monotonic() - self._began) * left / self._done
            line += f"  left {datetime.timedelta(seconds=round(seconds))}"
        self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        self._bar.stop()


def name(cell: Cell) -> str:
    """What tells a cell from others in one line: rule, settings, rate, seed."""
    settings = ",".join(f"{key}={value}" for key, value in cell.settings.items())
    return f"{cell.rule}{':' + settings if settings else ''} rate {cell.rate:g} seed {cell.seed}"


def run_cells(
    cells: Sequence[Cell],
    out: Path | str,
    devices: Sequence[str] = ("cpu",),
    *,
    resume: bool = True,
    workers: int = 1,
    compile: bool = False,
    display: SweepDisplay | None = None,
) -> Sweep:
    """Run cells and append their rows to the JSON-lines file `out`; returns the rows in the order of the cells.

    devices: one process for each, unless there is only one; workers: processes a device. resume: cells whose row is in
    `out` are not run again; else `out` must not exist. Equal cells run once.
    Raises UserError for a cell whose text or folder cannot be used, before anything runs.
    """
    out, display = Path(out), display or QuietSweep()
    if out.exists() and not resume:
        raise UserError(f"{out} already holds rows; add --resume to go on with them, or choose another --out")
    known = {row["key"]: row for row in read_json_lines(out) if "key" in row} if out.exists() else {}
    unique = {cell.key: cell for cell in cells}
    todo = [cell for key, cell in unique.items() if key not in known]
    for cell in todo:
        _parts(cell.data, cell.split, cell.batch, cell.ctx)
    make_folder(out.parent)
    places = [device for device in devices for _ in range(workers)][: max(1, len(todo))]
    found = Sweep()
    display.start(len(todo), sum(cell.steps for cell in todo))
    try:
        with JsonLines(out) as file:
            runs = _here(todo, places[0], compile, display)
            if len(places) > 1:
                runs = _side_by_side(todo, places, compile, display)
            for place, cell, row in runs:
                if isinstance(row, str):
                    found.failures.append((cell, row))
                    display.finished(place, cell, f"FAILED: {row}")
                else:
                    file.write(row)
                    known[cell.key] = row
                    bpb = row["val_bpb"]
                    told = "diverged" if bpb is None else f"val bpb {bpb:.4f}"
                    display.finished(place, cell, f"{told}  {row['seconds']:.1f} s")
    finally:
        display.stop()
    found.rows = [known[key] for key in unique if key in known]
    return found


def devices_called(text: str) -> list[str]:
    """ "auto", "cpu", "cuda" (all GPUs) or a list like "cuda:0,cuda:2" -> names of devices.

    Raises UserError for another name, and for a GPU that torch does not see.
    """
    there = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if text == "cpu" or (text == "auto" and not there):
        return ["cpu"]
    asked = there if text in ("auto", "cuda") else [name.strip() for name in text.split(",")]
    if bad := [name for name in asked if not re.fullmatch(r"cuda:[0-9]+", name)]:
        raise UserError(f"device is {bad[0]!r}; choose auto, cpu, cuda, or a list like cuda:0,cuda:1")
    if not asked or (missing := [name for name in asked if name not in there]):
        raise UserError(
            f"device {missing[0] if asked else 'cuda'} was asked for but torch sees "
            f"{len(there) or 'no'} GPU{'s' * (len(there) > 1)}; use --device cpu"
        )
    return asked


Outcome = tuple[int, Cell, dict[str, Any] | str]
"""Where a cell ran, the cell, and its row or what went wrong."""


@lru_cache(maxsize=4)
def _parts(data: str, split: str, batch: int, ctx: int) -> dict[str, np.ndarray]:
    return load_parts(data, split, batch, ctx)


def _attempt(cell: Cell, device: str, compile: bool, tell: Tell) -> dict[str, Any] | str:
    try:
        return run_cell(cell, _parts(cell.data, cell.split, cell.batch, cell.ctx), device, compile=compile, tell=tell)
    except Exception as error:  # whatever it is, the other cells can still run
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return kind + " ".join(str(error).split())
    finally:
        gc.collect()  # layers and consumers refer to each other
        if device.startswith("cuda"):
            torch.cuda.empty_cache()


def _here(cells: Sequence[Cell], device: str, compile: bool, display: SweepDisplay) -> Iterator[Outcome]:
    for cell in cells:
        yield 0, cell, _attempt(cell, device, compile, lambda done, cell=cell: display.at(0, cell, done))


def _work(pipe: Connection, device: str, compile: bool, threads: int) -> None:
    """A worker process: takes cells from the pipe until it is closed, sends back numbers of steps done and rows."""
    torch.set_num_threads(threads)
    try:
        while True:
            pipe.send(_attempt(pipe.recv(), device, compile, pipe.send))
    except (EOFError, OSError, KeyboardInterrupt):
        pass  # the other end has gone


class _Worker:
    """A process and its end of the pipe."""

    def __init__(self, device: str, compile: bool, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.device = device
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, device, compile, threads), daemon=True)
        self.process.start()
        other.close()
        self.cell: Cell | None = None

    def give(self, cell: Cell) -> None:
        """Let it run a cell."""
        self.cell = cell
        with suppress(OSError):  # it has died: reading from the pipe will tell
            self.pipe.send(cell)

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.pipe.close()
        self.process.terminate()
        self.process.join()


def _side_by_side(
    cells: Sequence[Cell], places: Sequence[str], compile: bool, display: SweepDisplay
) -> Iterator[Outcome]:
    """The outcomes as they come. A process that dies costs its cell; another takes its place."""
    left = list(reversed(cells))
    threads = max(1, torch.get_num_threads() // len(places))
    workers = [_Worker(device, compile, threads) for device in places]
    try:
        for worker in workers:
            worker.give(left.pop())
        while busy := {worker.pipe: place for place, worker in enumerate(workers) if worker.cell is not None}:
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                place = busy[pipe]
                worker = workers[place]
                assert worker.cell is not None
                try:
                    told = pipe.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    told = f"its process ended with code {worker.process.exitcode} (killed for memory, perhaps)"
                    workers[place] = _Worker(worker.device, compile, threads)
                if isinstance(told, int):
                    display.at(place, worker.cell, told)
                    continue
                yield place, worker.cell, told
                worker.cell = None
                if left:
                    workers[place].give(left.pop())
    finally:
        for worker in workers:
            worker.stop()
