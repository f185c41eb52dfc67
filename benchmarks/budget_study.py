"""The runs behind the table of models under a budget of bytes: rates tuned, contestants compared, parts taken away.

    python benchmarks/budget_study.py STAGE[,STAGE…] --data ENWIK8 --out FOLDER [--minutes M] [--seconds S] [--tuning T]
        [--known FILE] [--only NAME[,NAME…]] [--rate R] [--set KEY=VALUE …] [--begin]

Stages, each a list of cells in order of importance:

    tune     every contestant at each of its rates for T seconds, 16,000,000 bytes, scored on 1 MB of val
    main     every contestant for S seconds, 16,000,000 bytes, at rate R, else at the best that `tune` found or, if the
             known FILE has several of S seconds, that these show, else at its own
    main4    the same for 4,000,000 bytes
    seeds    two more seeds of the best float and the best ternary contestant of `main`
    ablate   recurrent ternary, 4,000,000 bytes, 800 steps at full depth: as it is and without each part, two seeds,
             scored on 1 MB of val
    small    the same parts on CPU cores: any text, width 64, 3 blocks of which one repeats 3 times, 300 steps,
             and beside them flat and progressive models of the same blocks, flat ones in float; two seeds

Every cell is a process of its own, one a GPU, side by side on all GPUs that there are; with --each N so many cells of
stages that go by steps and not by time (ablate, small) share one. A cell whose record is in FOLDER is not run again,
and with --minutes none begins that would not end in time, unless with --begin, so a study can be cut into calls as
short as that: the same command goes on, and must name the same S and T. Whatever still runs when the minutes are over
is told to stop, and goes on next time from where it was. After every cell FOLDER holds STAGE.md, a table, and
STAGE.json, the records; --slim leaves no shipped models. All others wait for tune, and seeds for main. --tiny: the same
cells in seconds. With another S the same FOLDER holds main, main4 and seeds of both lengths. collect_budget.py makes of
it result files and records that can be committed.

Around a cell of `tune` an H200 took 50 to 110 s, around one of `main` 85 (flat float) to 150 s (recurrent ternary); a
call learns from those before it. With S = 400 and T = 40 that is, in GPU-minutes: tune 37, seeds 35, and 8 to 9 for
each contestant of main and main4, which --only chooses.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tritwise.bench.budget import StoppedError, folder_name, run_record
from tritwise.bench.entries import ENTRIES, PARTS, base_config, entry
from tritwise.cli.commands import settings_given
from tritwise.data.source import describe, locate
from tritwise.errors import UserError
from tritwise.files import atomic_write, make_folder, read_json, write_json
from tritwise.report.bench_markdown import markdown
from tritwise.report.budget_rows import CONTESTS, WHOLE, trits_of, unpacked
from tritwise.report.budget_tables import HEAD, PART_HEAD, caption, part_rows, table_of
from tritwise.train import Config, override
from tritwise.train.progress import PlainLines

# What is tuned; others take the rate of the one that their name begins with, the longest.
RATES = {
    "flat-ternary": (0.02, 0.03, 0.045),
    "recurrent-ternary": (0.014, 0.02, 0.03),
    "flat-float": (0.01, 0.02, 0.04, 0.08, 0.16),
    "recurrent-float": (0.008, 0.016, 0.032, 0.064),
    "recurrent-ternary-lean-2-trits-ngrams": (0.007, 0.01, 0.014),
    "recurrent-ternary-lean-3-trits-ngrams": (0.005, 0.007, 0.01),
}
OFF: dict[str, dict[str, Any]] = {part: {part: type(value)(0)} for part, value in PARTS.items()}
ABLATED = "recurrent-ternary-constant"
ABLATIONS: dict[str, dict[str, Any]] = {
    WHOLE: {},
    "no repeats": {"loops": 1, "repeat_skip": False},
    **{f"no {p}": off for p, off in OFF.items()},
}
SHORT: dict[str, Any] = {"split": "90/1/9", "eval_interval": 0}  # scored once, at the end, on 1 MB of val
STAGES = ("tune", "main", "main4", "seeds", "ablate", "small")
BY_STEPS = {"ablate", "small"}  # their cells may share a GPU: what they reach does not depend on its speed
OVERHEAD = {"tune": 50.0}  # seconds of a cell that are not training: building, compiling, shipping, scoring
OTHERS, STEPPED = 95.0, 60.0  # those of other stages; the training of a cell that goes by steps
GRACE = 20.0  # seconds in which a cell that was told to stop saves what it has
WARM = 90.0  # seconds in which a cell gets somewhere: it builds and compiles for 30 to 60


class Study:
    """Cells of one text in one folder: `seconds` of training each, `tuning` in the stage tune. `tiny` shrinks all.
    known: a result file; what it has of tune and ablate is not run again, and its main says which rates are best. only:
    those whose cells are run. rate: of cells that are not about rates, in place of the best known. changes: settings of
    the contestants of main, main4 and seeds, over their own."""

    def __init__(
        self,
        data: str,
        out: Path,
        tiny: bool,
        seconds: float = 400.0,
        tuning: float = 100.0,
        known: Path | None = None,
        only: Collection[str] = ENTRIES,
        rate: float | None = None,
        changes: Mapping[str, Any] | None = None,
    ) -> None:
        self.data, self.out, self.tiny, self.seconds, self.tuning = data, out, tiny, seconds, tuning
        self.only, self.rate, self.changes = only, rate, changes or {}
        records = unpacked(read_json(known)) if known else []
        self.known = {
            _told(one["recipe"], one["config"]): one for one in records if one.get("stage") in ("tune", "ablate")
        }
        main = [one for one in records if one.get("stage") == "main"]
        self.whole = [one for one in main if one["config"]["train"]["seconds"] == seconds]

    def cell(self, name: str, budget: int, seconds: float, steps: int = 10**9, seed: int = 0, **changes: Any) -> Config:
        """One contestant. seconds 0: by steps."""
        shape: dict[str, Any] = {"ctx": 512, "batch": 64, "split": "90/5/5"}
        if self.tiny:
            shape |= {"ctx": 16, "batch": 2, "split": "90/5/5"}
            budget, seconds, steps = 150_000, seconds / 200, min(steps, 10**9 if seconds else 4)
            changes = {"ship_small": 500, **changes}
        base = base_config(self.data, steps=steps, seconds=seconds, seed=seed, **shape)
        settings = {"eval_interval": 2000, "eval_bytes": 262_144, "save_interval": 0, "keep": 1, "softcap": 30.0}
        if {"loops", "experts"} & {*ENTRIES[name]} and torch.cuda.is_available():
            settings["compile"] = "blocks"  # three depths as one code each took 105 s of a GPU before the clock
        if "-ternary" in name and torch.cuda.is_available():
            settings["interval"] = 2  # what no three seeds could tell from 1 (docs/RULE.md), and a tenth of a step
        config = entry(name, override(base, settings), budget, changes)
        return Config(config.recipe, config.model, replace(config.train, log_interval=100))

    def tune(self) -> list[Config]:
        """The rates of every contestant that has its own, on a part of val; to ship in many ways would take time."""
        order = (1, 0, *range(2, max(map(len, RATES.values()))))  # the middle first
        middle_first = [(name, rates[at]) for at in order for name, rates in RATES.items() if at < len(rates)]
        cells = []
        for name, rate in middle_first:
            more: dict[str, Any] = SHORT | ({"ship_as": "int6"} if name == "recurrent-float" else {})
            cells.append(self.cell(name, 16_000_000, self.tuning, rate=rate, **more))
        return cells

    def main(self, budget: int = 16_000_000) -> list[Config]:
        """Every contestant at its best rate."""
        return [self.contestant(name, budget) for name in ENTRIES]

    def contestant(self, name: str, budget: int, seed: int = 0) -> Config:
        """One of them."""
        changes: dict[str, Any] = {"rate": self.best_rate(name), **self.changes}
        return self.cell(name, budget, self.seconds, seed=seed, **changes)

    def main4(self) -> list[Config]:
        """The same with a quarter of the bytes."""
        return self.main(4_000_000)

    def seeds(self) -> list[Config]:
        """More seeds of the best of each kind in `main`: in float, and of each number of trits a weight."""
        done = [record for config in self.main() if (record := self.record(config)) is not None]
        best = {}
        for record in sorted(done, key=lambda record: record["scores"]["val_sliding"]["bpb"]):
            best.setdefault(trits_of(record), record["recipe"])
        if len(best) < 2:
            raise UserError("seeds needs the records of main; run main first")
        return [self.contestant(name, 16_000_000, seed) for seed in (1, 2) for name in best.values()]

    def ablate(self) -> list[Config]:
        """Each part taken away from the recurrent ternary model of one width, at full depth, for the same steps."""
        name, rate = ABLATED, self.best_rate("recurrent-ternary")
        shape = self.cell(name, 4_000_000, 0.0, 800).model
        fixed = {"width": shape.width, "depth": shape.depth, "average_every": 0, "rate": rate} | SHORT
        return [
            self.cell(name, 4_000_000, 0.0, 800, seed, **fixed | off) for seed in (0, 1) for off in ABLATIONS.values()
        ]

    def small(self) -> list[Config]:
        """Parts and forms of a model for a CPU, all for the same steps."""
        shape = {"width": 64, "depth": 3, "prelude": 1, "coda": 1, "loops": 3, "average_every": 10, "ship_small": 512}
        flat = {"width": 64, "depth": 3}
        cells = [(ABLATED, shape | off) for off in ABLATIONS.values()]
        cells += [("recurrent-ternary", shape), ("flat-ternary", flat | {"rate": 0.03})]
        cells += [("recurrent-float", shape | {"rate": rate, "momentum_warmup": 150}) for rate in (0.008, 0.024)]
        cells += [("flat-float", flat | {"ship_small": 512, "momentum_warmup": 150})]
        return [self._small_cell(name, seed, changes) for seed in (0, 1) for name, changes in cells]

    def _small_cell(self, name: str, seed: int, changes: dict[str, Any]) -> Config:
        base = base_config(self.data, "90/10", ctx=64, batch=16, steps=300, seconds=0, seed=seed)
        return entry(name, override(base, {"eval_interval": 0, "save_interval": 0}), 1_000_000, changes)

    def best_rate(self, name: str) -> float:
        """The rate that was given, else the one at which `tune` scored best, else the contestant's own. Where a known
        file has several rates for the whole time, of the contestant or else of the one that it is made after, these
        decide: what is best for a tenth of it may be too high."""
        if self.rate is not None:
            return self.rate
        tuned = max((own for own in RATES if name.startswith(own)), key=len)
        for known in (name, tuned):  # its own rates, else those of the one that it is made after
            done = [one for one in self.whole if one["recipe"] == known]
            if len({one["rate"] for one in done}) > 1:
                break
        else:
            done = [record for config in self.tune() if (record := self.record(config)) is not None]
            done = [record for record in done if record["recipe"] == tuned]
        scores = [(r["scores"]["val_sliding"]["bpb"], r["rate"]) for r in done]
        return min(scores)[1] if scores else float(ENTRIES[name]["rate"])

    def record(self, config: Config) -> dict[str, Any] | None:
        """What is known of a cell; None if it has not been run."""
        place = self.folder(config) / "record.json"
        return read_json(place) if place.exists() else self.known.get(_told(config.recipe, config.as_dict()))

    def folder(self, config: Config) -> Path:
        """Where a cell's files lie."""
        return self.out / "records" / folder_name(config)

    def trained(self, config: Config) -> float:
        """Seconds of training that a stopped cell has behind it, by its newest checkpoint; 0 if it has none."""
        told = sorted((self.folder(config) / "checkpoints").glob("step_*.json"))
        return float(read_json(told[-1])["meta"]["trained"]) if told else 0.0

    def open(self, config: Config) -> bool:
        """Whether a cell is still to be run: its contestant is, it has no record, and has not failed for good."""
        if config.recipe not in self.only:
            return False
        return self.record(config) is None and not (self.folder(config) / "failed.json").exists()


def _told(recipe: str, config: dict[str, Any]) -> tuple[Any, ...]:
    """What a cell of tune or ablate is known by."""
    train, model = config["train"], config["model"]
    settings = (train[key] for key in ("rate", "seed", "budget", "seconds", "split"))
    return (recipe, *settings, *(model[key] for key in (*PARTS, "loops")))


def estimated(config: Config, stage: str, walls: dict[str, float], trained: float = 0.0) -> float:
    """Seconds that a cell takes at the least: what is left of its training, and the least that one of its contestant
    took beside it in this stage, a little more. One that takes longer is stopped, and goes on in the next call: better
    than GPUs that wait. trained: seconds that are behind it."""
    known = walls.get(f"{stage} {config.recipe}")
    around = OVERHEAD.get(stage, OTHERS) if known is None else 1.1 * known
    return max(0.0, (config.train.seconds or STEPPED) - trained) + around


def needed(config: Config, stage: str, walls: dict[str, float], trained: float, begin: bool) -> float:
    """Seconds that must be left for a cell to be started: as `estimated`, or if it may `begin`, enough to get on."""
    seconds = estimated(config, stage, walls, trained)
    return min(WARM, seconds) if begin else seconds


def run_cell(study: Study, stage: str, name: str) -> int:
    """One cell in this process, by the name of its folder: 0, or 1 if it failed for good, with the reason beside it."""
    config = next(config for config in getattr(study, stage)() if folder_name(config) == name)
    parts = ("val", "test") if stage in CONTESTS else ("val",)
    folder = study.folder(config)
    try:
        record = run_record(config, folder, PlainLines(Console(highlight=False, soft_wrap=True)), parts)
        write_json(folder / "record.json", tagged(record, stage))
    except UserError as error:  # one that does not fit, or diverged, is told and does not end the others
        if (folder / "config.json").exists() and not isinstance(error, StoppedError):
            write_json(folder / "failed.json", {"error": str(error)})
        print(f"FAILED: {error}")
        return 1
    return 0


def waves(stages: list[str]) -> list[list[str]]:
    """Stages that may run beside each other, in order: what they need to know is found in the waves before."""
    found: list[list[str]] = []
    for stage in stages:
        if found and stage != "seeds" and not {"tune", "seeds"} & {*found[-1]}:
            found[-1].append(stage)
        else:
            found.append([stage])
    return found


def run_wave(
    study: Study,
    stages: list[str],
    ends: float,
    console: Console,
    more: list[str],
    slim: bool = False,
    each: int = 1,
    begin: bool = False,
) -> int:
    """Run the cells of these stages that end in time, one a GPU, or `each` if none of them is timed; returns how many
    are left. more: flags for each cell. begin: those that do not end in time too, if there is time to warm up."""
    known = study.out / "walls.json"
    walls: dict[str, float] = read_json(known) if known.exists() else {}
    cells = {stage: getattr(study, stage)() for stage in stages}
    waiting = [(s, config, study.trained(config)) for s in stages for config in cells[s] if study.open(config)]
    gpus = max(1, torch.cuda.device_count())
    free = list(range(gpus * (each if BY_STEPS.issuperset(stages) else 1)))
    running: dict[int, tuple[subprocess.Popen[bytes], str, Config, float, float]] = {}
    for stage in stages:
        write_tables(study, stage, cells[stage])
    while True:
        now = time.monotonic()
        fits = [
            (stage, config, before)
            for stage, config, before in waiting
            if now < ends and (study.tiny or now + needed(config, stage, walls, before, begin) <= ends)
        ]
        while free and fits:
            (stage, config, before), place = fits.pop(0), free.pop(0)
            waiting.remove((stage, config, before))
            console.print(f"{stage}: {config.recipe} rate {config.train.rate:g} seed {config.train.seed}", markup=False)
            running[place] = (start_cell(study, stage, config, place % gpus, more), stage, config, now, before)
        if not running:
            return sum(study.open(config) for stage in stages for config in cells[stage])
        for place, (process, stage, config, began, before) in list(running.items()):
            if process.poll() is None and now >= ends:
                process.terminate() if now < ends + GRACE else process.kill()
            if process.poll() is None:
                continue
            del running[place]
            free.append(place)
            took, record = time.monotonic() - began, study.record(config)
            told = f"not done, see {log_of(study, config)}" if record is None else "done"
            console.print(f"{stage}: {config.recipe} {told}, {took:.0f} s in all", markup=False)
            if record is not None:
                key = f"{stage} {config.recipe}"
                walls[key] = min(walls.get(key, took), max(0.0, took - (record["seconds"] - before)))
                write_json(known, walls)
                shutil.rmtree(study.folder(config) / "checkpoints", ignore_errors=True)
                if slim:
                    (study.folder(config) / record["file"]).unlink(missing_ok=True)
            write_tables(study, stage, cells[stage])
        time.sleep(0.2)


def start_cell(study: Study, stage: str, config: Config, gpu: int, more: list[str]) -> "subprocess.Popen[bytes]":
    """The process of a cell on one of the GPUs that this process sees; what it prints goes to a file."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    numbers = seen.split(",") if seen else [str(number) for number in range(torch.cuda.device_count())]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": numbers[gpu]} if torch.cuda.device_count() else {})
    command = [sys.executable, __file__, stage, "--cell", folder_name(config), "--out", str(study.out), *more]
    make_folder(log_of(study, config).parent)
    with log_of(study, config).open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def log_of(study: Study, config: Config) -> Path:
    """What a cell's process prints."""
    return study.out / "logs" / f"{folder_name(config)}.log"


def tagged(record: dict[str, Any], stage: str) -> dict[str, Any]:
    """A record that says of which stage it is, and where parts are taken away, which of ABLATIONS."""
    told = record | {"stage": stage}
    if stage in ("ablate", "small") and record["recipe"] == ABLATED:
        model, full = record["config"]["model"], {**PARTS, "loops": ENTRIES[ABLATED]["loops"]}
        for name, off in ABLATIONS.items():
            if all(model[key] == value for key, value in (full | off).items()):
                told["variant"] = name
    return told


def write_tables(study: Study, stage: str, configs: list[Config]) -> None:
    """The records of a stage that are there, as JSON, and their table."""
    records = [tagged(record, stage) for config in configs if (record := study.record(config)) is not None]
    write_json(study.out / f"{stage}.json", {"stage": stage, "cells": len(configs), "records": records})
    told = [caption(records) if records else "No cell has been run."]
    if stage in ("main", "main4", "seeds"):
        told.append(f"Rates: the best of each contestant's after {study.tuning:g} s at 16,000,000 bytes.")
    told.append(markdown(HEAD, table_of(records)))
    if rows := part_rows(records):
        told.append(markdown(PART_HEAD, rows))
    atomic_write(study.out / f"{stage}.md", ("\n\n".join(told) + "\n").encode())


def run(arguments: list[str] | None = None) -> int:
    """The command line; 0, or 3 if cells are left for another time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", help="tune,main,main4,seeds,ablate,small")
    parser.add_argument("--data", required=True, help="enwik8, plain or packed")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--minutes", type=float, default=1e9, help="no cell begins that would not end within these")
    parser.add_argument("--seconds", type=float, default=400.0, help="training of a cell of main, main4 and seeds")
    parser.add_argument("--tuning", type=float, default=100.0, help="training of a cell of tune")
    parser.add_argument(
        "--known", type=Path, help="a result file whose runs of tune and ablate, and rates of main, count if S and T do"
    )
    parser.add_argument("--each", type=int, default=1, help="cells that share a GPU, of stages that go by steps")
    parser.add_argument("--only", default=",".join(ENTRIES), help="contestants whose cells are run; all others wait")
    parser.add_argument("--rate", type=float, help="of cells of main, main4, seeds and ablate, in place of the best")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE: settings of main, main4 and seeds")
    parser.add_argument("--begin", action="store_true", help="start cells too that will be stopped, to go on next time")
    parser.add_argument("--slim", action="store_true", help="keep no shipped models, only what is said of them")
    parser.add_argument("--tiny", action="store_true", help="seconds on a CPU, to see that everything runs")
    parser.add_argument("--cell", help="one cell, in this process: the name of its folder")
    given = parser.parse_args(arguments)
    ends, console = time.monotonic() + 60 * given.minutes, Console(highlight=False, soft_wrap=True)
    data = str(locate(given.data).resolve()) if Path(given.data).exists() else given.data
    left = 0
    more = ["--data", data, "--seconds", str(given.seconds), "--tuning", str(given.tuning)]
    more += ["--rate", str(given.rate)] if given.rate is not None else []
    more += [word for pair in given.set for word in ("--set", pair)]
    more += [*(["--tiny"] if given.tiny else []), *(["--known", str(given.known)] if given.known else [])]
    try:
        only = given.only.split(",")
        times, changes = (given.seconds, given.tuning), settings_given(given.set)
        study = Study(data, given.out, given.tiny, *times, given.known, only, given.rate, changes)
        stages = given.stages.split(",")
        for stage in stages:
            if stage not in STAGES:
                raise UserError(f"there is no stage {stage!r}; choose of {', '.join(STAGES)}")
        for name in set(only) - set(ENTRIES):
            raise UserError(f"there is no contestant {name!r}; choose of {', '.join(ENTRIES)}")
        if given.cell:
            return run_cell(study, stages[0], given.cell)
        make_folder(study.out)
        describe(data)  # unpacked once, before the cells need it
        for wave in waves(stages):
            if left := run_wave(study, wave, ends, console, more, given.slim, given.each, given.begin):
                break
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(f"{left} cells are left" if left else "done", markup=False)
    return 3 if left else 0


if __name__ == "__main__":
    sys.exit(run())
