"""The runs behind the table of models under a budget of bytes: rates tuned, contestants compared, parts taken away.

    python benchmarks/budget_study.py STAGE[,STAGE…] --data ENWIK8 --out FOLDER [--minutes M] [--tiny]

Stages, each a list of cells in order of importance:

    tune     every contestant at each of its rates for a quarter of the time, 16,000,000 bytes
    main     every contestant for 400 s at the best rate that `tune` found (else its own), 16,000,000 bytes
    main4    the same for 4,000,000 bytes
    seeds    two more seeds of the best float and the best ternary contestant of `main`
    ablate   recurrent ternary, 4,000,000 bytes, 800 steps at full depth: as it is and without each part, two seeds
    small    the same parts on CPU cores: any text, width 64, 3 blocks of which one repeats 3 times, 300 steps,
             and beside them flat and progressive models of the same blocks, flat ones in float; two seeds

A cell is thought to take nine minutes on one H100 at the most, of which 400 s are training; not yet measured. One whose
record is in FOLDER is not run again, and with --minutes none begins that would not end in time, so a study can be cut
into pieces as short as that. One that was cut off goes on from its last thousand steps, or with its scores. After every
cell FOLDER holds STAGE.md, a table, and STAGE.json, the records. --tiny: the same cells in seconds, on a CPU.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from tritwise.bench.budget import HEAD, folder_name, run_record, table_of
from tritwise.bench.entries import ENTRIES, PARTS, base_config, entry
from tritwise.errors import UserError
from tritwise.files import atomic_write, read_json, write_json
from tritwise.train import Config, override
from tritwise.train.progress import PlainLines

RATES = {
    "flat-ternary": (0.02, 0.03, 0.045),
    "recurrent-ternary": (0.02, 0.03, 0.045),
    "flat-float": (0.01, 0.02, 0.04),
    "recurrent-float": (0.004, 0.008, 0.016),
}
LIKE = {"recurrent-ternary-constant": "recurrent-ternary"}  # whose tuned rate a contestant takes
OFF: dict[str, dict[str, Any]] = {part: {part: type(value)(0)} for part, value in PARTS.items()}
ABLATIONS = {
    "as it is": {},
    "no repeats": {"loops": 1, "repeat_skip": False},
    **{f"no {p}": off for p, off in OFF.items()},
}
STAGES = ("tune", "main", "main4", "seeds", "ablate", "small")
OVERHEAD = 140.0  # seconds of a cell that are not training: building, compiling, shipping, scoring 10 MB


class Study:
    """Cells of one text in one folder. `tiny` shrinks all of them."""

    def __init__(self, data: str, out: Path, tiny: bool) -> None:
        self.data, self.out, self.tiny = data, out, tiny

    def cell(self, name: str, budget: int, seconds: float, steps: int = 10**9, seed: int = 0, **changes: Any) -> Config:
        """One contestant. seconds 0: by steps."""
        shape: dict[str, Any] = {"ctx": 512, "batch": 64, "split": "90/5/5"}
        if self.tiny:
            shape |= {"ctx": 16, "batch": 2, "split": "90/5/5"}
            budget, seconds, steps = 150_000, seconds / 200, min(steps, 10**9 if seconds else 4)
            changes = {"ship_small": 500, **changes}
        base = base_config(self.data, steps=steps, seconds=seconds, seed=seed, **shape)
        settings = {"eval_interval": 500, "eval_bytes": 262_144, "save_interval": 1000, "keep": 1, "softcap": 30.0}
        config = entry(name, override(base, settings), budget, changes)
        return Config(config.recipe, config.model, replace(config.train, log_interval=100))

    def tune(self) -> list[Config]:
        """The rates of every contestant that has its own."""
        names = list(RATES)
        middle_first = [(name, rates[at]) for at in (1, 0, 2) for name in names for rates in (RATES[name],)]
        return [self.cell(name, 16_000_000, 100.0, rate=rate) for name, rate in middle_first]

    def main(self, budget: int = 16_000_000, seconds: float = 400.0) -> list[Config]:
        """Every contestant at its best rate."""
        return [self.cell(name, budget, seconds, rate=self.best_rate(name)) for name in ENTRIES]

    def main4(self) -> list[Config]:
        """The same with a quarter of the bytes."""
        return self.main(4_000_000)

    def seeds(self) -> list[Config]:
        """More seeds of the best of each kind in `main`."""
        done = [record for config in self.main() if (record := self.record(config)) is not None]
        best = {}
        for record in sorted(done, key=lambda record: record["scores"]["val_sliding"]["bpb"]):
            best.setdefault(record["config"]["model"]["weights"], record["recipe"])
        if len(best) < 2:
            raise UserError("seeds needs the records of main; run main first")
        pairs = [(name, seed) for seed in (1, 2) for name in best.values()]
        return [self.cell(name, 16_000_000, 400.0, seed=seed, rate=self.best_rate(name)) for name, seed in pairs]

    def ablate(self) -> list[Config]:
        """Each part taken away from the recurrent ternary model of one width, at full depth, for the same steps."""
        name, rate = "recurrent-ternary-constant", self.best_rate("recurrent-ternary")
        shape = self.cell(name, 4_000_000, 0.0, 800).model
        fixed = {"width": shape.width, "depth": shape.depth, "average_every": 0, "rate": rate}
        return [
            self.cell(name, 4_000_000, 0.0, 800, seed, **fixed | off) for seed in (0, 1) for off in ABLATIONS.values()
        ]

    def small(self) -> list[Config]:
        """Parts and forms of a model for a CPU, all for the same steps."""
        shape = {"width": 64, "depth": 3, "prelude": 1, "coda": 1, "loops": 3, "average_every": 10, "ship_small": 512}
        flat = {"width": 64, "depth": 3}
        cells = [("recurrent-ternary-constant", shape | off) for off in ABLATIONS.values()]
        cells += [("recurrent-ternary", shape), ("flat-ternary", flat | {"rate": 0.03})]
        cells += [("recurrent-float", shape | {"rate": rate, "momentum_warmup": 150}) for rate in (0.008, 0.024)]
        cells += [("flat-float", flat | {"ship_small": 512, "momentum_warmup": 150})]
        return [self._small_cell(name, seed, changes) for seed in (0, 1) for name, changes in cells]

    def _small_cell(self, name: str, seed: int, changes: dict[str, Any]) -> Config:
        base = base_config(self.data, "90/10", ctx=64, batch=16, steps=300, seconds=0, seed=seed)
        return entry(name, override(base, {"eval_interval": 0, "save_interval": 0}), 1_000_000, changes)

    def best_rate(self, name: str) -> float:
        """The rate at which `tune` scored best; the contestant's own while nothing was tuned."""
        tuned = LIKE.get(name, name)
        done = [record for config in self.tune() if (record := self.record(config)) is not None]
        scores = [(r["scores"]["val_sliding"]["bpb"], r["rate"]) for r in done if r["recipe"] == tuned]
        return min(scores)[1] if scores else float(ENTRIES[name]["rate"])

    def record(self, config: Config) -> dict[str, Any] | None:
        """What is known of a cell; None if it has not been run."""
        place = self.folder(config) / "record.json"
        return read_json(place) if place.exists() else None

    def folder(self, config: Config) -> Path:
        """Where a cell's files lie."""
        return self.out / "records" / folder_name(config)


def estimated(config: Config) -> float:
    """Seconds that a cell takes on one H100, generously."""
    return config.train.seconds + OVERHEAD if config.train.seconds else 100 + OVERHEAD


def run_stage(study: Study, stage: str, ends: float, console: Console) -> int:
    """Run the cells of a stage that end in time; returns how many are left."""
    cells: Callable[[], list[Config]] = getattr(study, stage)
    left = 0
    for config in cells():
        if study.record(config) is None:
            if time.monotonic() + (0 if study.tiny else estimated(config)) > ends:
                left += 1
                continue
            console.print(f"{stage}: {config.recipe} rate {config.train.rate:g} seed {config.train.seed}", markup=False)
            try:
                run_record(config, study.folder(config), PlainLines(console))
            except UserError as error:  # one that does not fit, or diverged, is told and does not end the others
                console.print(f"FAILED {config.recipe}: {error}", markup=False)
                left += 1
        write_tables(study, stage, cells())
    return left


def write_tables(study: Study, stage: str, configs: list[Config]) -> None:
    """The records of a stage that are there, as JSON, and their table."""
    records = [record for config in configs if (record := study.record(config)) is not None]
    write_json(study.out / f"{stage}.json", {"stage": stage, "cells": len(configs), "records": records})
    head, rows = list(HEAD), table_of(records)
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["--"] * len(head), *rows)]
    if stage in ("ablate", "small"):
        lines += ["", "| variant | bpb, val, sliding | seeds |", "| -- | -- | -- |", *ablation_rows(study, configs)]
    atomic_write(study.out / f"{stage}.md", ("\n".join(lines) + "\n").encode())


def ablation_rows(study: Study, configs: list[Config]) -> list[str]:
    """One line a variant: its score at each seed."""
    names, lines = list(ABLATIONS), []
    for at, name in enumerate(names):
        done = [study.record(config) for config in configs[at :: len(configs) // 2]]
        scores = [record["scores"]["val_sliding"]["bpb"] for record in done if record is not None]
        if scores:
            each = ", ".join(f"{score:.4f}" for score in scores)
            lines.append(f"| {name} | {sum(scores) / len(scores):.4f} | {each} |")
    return lines


def run(arguments: list[str] | None = None) -> int:
    """The command line; 0, or 3 if cells are left for another time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", help="tune,main,main4,seeds,ablate,small")
    parser.add_argument("--data", required=True, help="enwik8, plain or packed")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--minutes", type=float, default=1e9, help="no cell begins that would not end within these")
    parser.add_argument("--tiny", action="store_true", help="seconds on a CPU, to see that everything runs")
    given = parser.parse_args(arguments)
    ends, console = time.monotonic() + 60 * given.minutes, Console(highlight=False, soft_wrap=True)
    study, left = Study(given.data, given.out, given.tiny), 0
    try:
        for stage in given.stages.split(","):
            if stage not in STAGES:
                raise UserError(f"there is no stage {stage!r}; choose of {', '.join(STAGES)}")
            left += run_stage(study, stage, ends, console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(f"{left} cells are left" if left else "done", markup=False)
    return 3 if left else 0


if __name__ == "__main__":
    sys.exit(run())
