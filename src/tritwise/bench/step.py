"""`tritwise bench step`: what a training step takes, ours beside float rivals, on the same model and in the same run.

Contenders take their turns A B C, A B C, …, so that what disturbs the machine disturbs all. A turn is one step that
does not count and a few that do; a contender's figure is the median of its turns, and ratios are ratios of medians.
Where all models do not fit into memory side by side, every turn builds its model anew and lets go of it.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tritwise.bench.hardware import measure_hardware
from tritwise.bench.memory import device_bytes, free_bytes, hand_back, resident_bytes, restart_peak
from tritwise.bench.phases import Clock
from tritwise.bench.runner import ENTRIES, Batches, Entry, Runner, entries_called
from tritwise.bench.sizes import Size, flops_of, weights_of
from tritwise.errors import UserError, is_out_of_memory
from tritwise.files import finite, write_json
from tritwise.nn import trit_modules
from tritwise.ops import backend_table
from tritwise.train.audit import audit, peak_bytes
from tritwise.train.run import surroundings

WARM_UP = 2  # steps of a fresh model before its first turn
BRIEF = 3.0  # seconds for a turn of everybody, up to which turns are taken even when the time is up
LEFT_OUT = "left out: the time was up"
RIVAL = "adamw-bf16"  # whom ratios are over, where it runs


@dataclass
class Figures:
    """What is known of a contender so far."""

    entry: Entry
    seconds: list[float] = field(default_factory=list)
    phases: dict[str, float] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass
class StepBench:
    """Takes the measurements of `measure_steps`, a turn at a time."""

    size: Size
    device: torch.device
    dtype: torch.dtype
    steps: int
    seed: int
    batches: Batches
    figures: dict[str, Figures]
    tell: Callable[[str], None]
    save: Callable[[], None] = lambda: None  # what is known so far, should the run be cut off

    def side_by_side(self, rounds: int, until: float) -> None:
        """Build all models, then let them take turns; `rounds` turns each, fewer once `until` has passed, if
        turns take long: to build small models takes most of the time."""
        took = 0.0
        runners: dict[str, Runner] = {}
        for name, figures in self.figures.items():
            if runners and time.monotonic() > until:
                figures.error = LEFT_OUT
            elif (runner := self._guarded(name, lambda name=name: self._built(name))) is not None:
                runners[name] = runner
        for number in range(rounds):
            began = time.monotonic()
            for name in list(runners):
                if number and took > BRIEF and time.monotonic() > until:
                    break
                if self._guarded(name, lambda name=name: self._timed(name, runners[name])) is None:
                    del runners[name]
            took = time.monotonic() - began
        for name, runner in runners.items():
            self._guarded(name, lambda name=name, runner=runner: self._finish(name, runner))

    def one_by_one(self, rounds: int, until: float) -> None:
        """The same with one model in memory at a time, built anew for every turn."""
        for number in range(rounds):
            for name, figures in self.figures.items():
                if time.monotonic() > until:
                    if not figures.seconds and figures.error is None:
                        figures.error = LEFT_OUT
                    continue
                self._guarded(name, lambda name=name, first=number == 0: self._alone(name, first))

    def _alone(self, name: str, first: bool) -> None:
        runner = self._built(name)
        self._timed(name, runner)
        if first:
            self._finish(name, runner)

    def _guarded(self, name: str, run: Callable[[], Any]) -> Any:
        """What `run` gives; None if the contender fails now or has failed before. The others go on."""
        figures = self.figures[name]
        if figures.error is not None:
            return None
        try:
            return run()
        except Exception as error:  # whatever it is, the others can still run
            told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            figures.error = "out of memory" if is_out_of_memory(error) else told
            self.tell(f"{name}: {figures.error}")
        self.let_go()  # outside the handler, whose traceback holds on to tensors
        return None

    def _built(self, name: str) -> Runner:
        """A fresh runner after its warm-up; the first one's memory is noted."""
        figures = self.figures[name]
        self.let_go()
        restartable = restart_peak(self.device)
        before = resident_bytes(self.device)
        runner = Runner(figures.entry, self.size, self.batches, self.device, self.dtype, self.seed)
        began = time.perf_counter()
        for _ in range(WARM_UP):
            runner.step()
        Clock(self.device).wait()
        if not figures.facts:
            peak = peak_bytes()
            report = audit(runner.model, runner.optimizers)
            figures.facts = {
                "peak_bytes": peak - before if restartable and before is not None else None,
                "device_bytes": device_bytes(self.device),
                "state_bytes": report["state_bytes"],
                "bytes_per_weight": report["state_bytes"] / report["weights"],
                "float_state_bytes": report["float_state_bytes"],
                "weights": report["weights"],
                "layers": len(list(trit_modules(runner.model))),
                "first_steps_seconds": time.perf_counter() - began,
            }
        return runner

    def _timed(self, name: str, runner: Runner) -> float:
        seconds = runner.turn(self.steps)
        self.figures[name].seconds.append(seconds)
        self.tell(f"{name}: {1000 * seconds:.2f} ms a step")
        self.save()
        return seconds

    def _finish(self, name: str, runner: Runner) -> None:
        figures = self.figures[name]
        figures.phases = runner.phases(self.steps)
        losses = [float(loss) for loss in runner.losses]
        figures.facts |= {"first_loss": losses[0], "last_loss": losses[-1], "steps_taken": len(losses)}
        # The allocator hands nothing back while a model takes its steps: this is the most that was in use.
        figures.facts["device_bytes"] = device_bytes(self.device)
        self.save()

    def let_go(self) -> None:
        """Free what nothing refers to any more, on the device as well."""
        hand_back()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def measure_steps(
    size: Size,
    names: Sequence[str] = tuple(ENTRIES),
    *,
    device: torch.device | str = "cpu",
    rounds: int = 5,
    steps: int = 5,
    together: bool | None = None,
    seconds: float = 600.0,
    seed: int = 0,
    data: str = "shakespeare",
    short: bool = False,
    out: Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure every contender's step; plain JSON, written to `out` as well.

    rounds, steps  turns of each contender, and timed steps of a turn
    together       all models in memory at once (True), one at a time (False), or as there is room (None)
    seconds        nobody's further turn begins after so many, but for brief ones of models side by side
    short          the hardware is measured in little time, for a test

    A row says: step_ms, tokens_per_s (a token is a byte), ratio (its speed over that of adamw-bf16), tflops, mfu (the
    model's operations over what the measured matmul rate allows), phases_ms, update_share, peak_bytes (the most it held
    of the device's memory while built and taking its first steps, over what was there before), device_bytes (all
    memory of the device in use then, by anyone), state_bytes by the audit, first and last loss, and error, which
    is None unless the contender failed. Raises UserError for a contender that is not there.
    """
    entries = entries_called(names)
    device = torch.device(device)
    if rounds < 1 or steps < 1:
        raise UserError(f"rounds is {rounds} and steps is {steps}; both must be at least 1")
    if size.mode.endswith("graph") and device.type != "cuda":
        raise UserError(f"mode {size.mode} needs a GPU; choose eager, blocks or whole")
    if device.index is not None:
        torch.cuda.set_device(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    until = time.monotonic() + seconds
    hardware = measure_hardware(device, dtype, short=short)
    figures = {name: Figures(entry) for name, entry in entries.items()}
    bench = StepBench(size, device, dtype, steps, seed, Batches(size, device, data, seed), figures, tell)
    if together is None:
        together = _fits_together(entries, size, device)
    told = {"bench": "step", "side_by_side": together, "rounds": rounds, "steps": steps, "hardware": hardware}
    told |= {"dtype": str(dtype).removeprefix("torch."), **surroundings(device)}

    def result() -> dict[str, Any]:
        return finite(told | {"rows": _rows(figures, size, dtype, hardware), "backends": backend_table()})

    def save() -> None:
        if out is not None:
            write_json(out, result())

    bench.save = save
    (bench.side_by_side if together else bench.one_by_one)(rounds, until)
    bench.let_go()
    save()
    return result()


def _fits_together(entries: dict[str, Entry], size: Size, device: torch.device) -> bool:
    """Whether the states of all models take less than a third of the free memory; activations need the rest. Recorded
    graphs keep their activations, about 16 numbers of `width` a byte and block, each for itself."""
    free = free_bytes(device)
    held = sum(entry.held for entry in entries.values()) * weights_of(size.config)
    if size.mode.endswith("graph"):
        shape = size.config
        held += len(entries) * size.batch * shape.ctx * shape.depth * shape.width * 16 * 2
    return free is not None and held < free / 3


def _rows(
    figures: dict[str, Figures], size: Size, dtype: torch.dtype, hardware: dict[str, Any]
) -> list[dict[str, Any]]:
    rows = [_row(name, known, size, dtype, hardware) for name, known in figures.items()]
    rival = next((row["step_ms"] for row in rows if row["contender"] == RIVAL), None)
    return [row | {"ratio": rival / row["step_ms"] if rival and row["step_ms"] else None} for row in rows]


def _row(name: str, figures: Figures, size: Size, dtype: torch.dtype, hardware: dict[str, Any]) -> dict[str, Any]:
    shape, seconds = size.config, statistics.median(figures.seconds) if figures.seconds else None
    flops = flops_of(shape, size.bytes_a_step)
    phases = figures.phases
    return {
        "bench": "step",
        "contender": name,
        "rule": figures.entry.rule,
        "rate": figures.entry.rate,
        "settings": figures.entry.settings,
        "size": size.name,
        "width": shape.width,
        "depth": shape.depth,
        "ctx": shape.ctx,
        "batch": size.batch,
        "accum": size.accum,
        "bytes_a_step": size.bytes_a_step,
        "mode": size.mode,
        "checkpoint": size.checkpoint,
        "dtype": str(dtype).removeprefix("torch."),
        "step_ms": 1000 * seconds if seconds else None,
        "step_ms_rounds": [1000 * one for one in figures.seconds],
        "tokens_per_s": size.bytes_a_step / seconds if seconds else None,
        "flops_a_step": flops,
        "tflops": flops / seconds / 1e12 if seconds else None,
        "mfu": flops / seconds / hardware["matmul_flops_per_s"] if seconds else None,
        "phases_ms": phases,
        "update_share": phases["update"] / sum(phases.values()) if phases else None,
        "error": figures.error,
        **figures.facts,
    }
