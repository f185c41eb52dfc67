"""Turns folders of budget_study.py, or of `tritwise bench budget`, into result files and records that can be committed.

    python benchmarks/collect_budget.py FOLDER [FOLDER …] [--date YYYY-MM-DD]

writes, for each kind of machine that ran, benchmarks/results/budget_{h100,h200,cpu2}_DATE.json with every run of every
stage, for `make readme` and docs/RECURRENCE.md, and a folder records/MACHINE/STAGE-RUN for each run of main, main4 and
seeds: record.json, config.json, manifest.json and the log, never a model or a checkpoint, and nothing of where files
lay. A log without its bulk is called metrics_thinned.jsonl, and says in its first line what was left out.

The newest result file of a machine counts alone. A FOLDER may be such a file too: its runs go into the new one.
"""

import argparse
import datetime
import re
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from budget_study import STAGES, tagged
from collect_demo import PROVENANCE

from tritwise.errors import UserError
from tritwise.files import JsonLines, atomic_write, canonical_json, make_folder, read_json, read_json_lines, write_json
from tritwise.report.budget_rows import CONTESTS, packed, unpacked
from tritwise.report.budget_rows import STAGES as ORDER
from tritwise.report.machine import machine_name

ROOT = Path(__file__).resolve().parent.parent
MACHINES = {"H100": "h100", "H200": "h200", "cpu": "cpu2"}  # what a device's name holds -> what files are called
KEPT = tuple(stage for stage in CONTESTS if stage != "bench")
MOST = 120  # lines of each kind that a log keeps
LAST_ONLY = ("layers",)  # kinds of which only the last line is kept: hundreds of numbers each
_PATH = re.compile(r"(?<![\w./])/(?:[^\s/'\",;:]+/)*([^\s/'\",;:]+)")


class Run(NamedTuple):
    """A record, and the folder of its run if there is one; or a run that left no model, and why."""

    record: dict[str, Any]
    folder: Path | None = None
    failed: bool = False

    @property
    def machine(self) -> str:
        """h100, h200 or cpu2. Raises UserError for another."""
        device = self.record["device"]
        for word, name in MACHINES.items():
            if word in device:
                return name
        raise UserError(f"no result file is named for {device}; add it to MACHINES of collect_budget.py")

    @property
    def identity(self) -> bytes:
        """The same for two records of one cell on one kind of machine; processors differ in what they do in a time."""
        return canonical_json([self.record["recipe"], self.record["config"], machine_name(self.record)])


def runs_of(place: Path) -> list[Run]:
    """What a study's folder or a result file holds. Raises UserError if that is nothing."""
    if place.is_file():
        file = read_json(place)
        if not isinstance(file, dict) or file.get("kind") != "budget":
            raise UserError(f"{place} is no result file of a budget; name a folder of budget_study.py")
        failed = [Run(run, failed=True) for run in file.get("failed", [])]
        return [*(Run(record) for record in unpacked(file)), *failed]
    study = any((place / f"{stage}.json").exists() for stage in STAGES)
    found = [run for folder in sorted((place / "records").glob("*")) if (run := run_of(folder, study)) is not None]
    if not found:
        raise UserError(f"{place} holds no records; name the --out of budget_study.py or of tritwise bench budget")
    return found


def run_of(folder: Path, study: bool) -> Run | None:
    """The run in `folder`, of budget_study.py or else of `tritwise bench budget`; None if it is not finished."""
    if not (folder / "manifest.json").exists():
        return None
    manifest = public(read_json(folder / "manifest.json"))
    if (folder / "record.json").exists():
        record = read_json(folder / "record.json")
        record = tagged(record, record.get("stage") or (stage_of(record) if study else "bench"))
        if (folder / "result.json").exists():  # scored from memory before it shipped, and again from the file
            record["chunked_before"] = read_json(folder / "result.json")["val_chunked"]["bpb"]
        if not study:
            record["command"] = shlex.join(["tritwise", *manifest["command"][1:]])
        return Run(record, folder)
    if (folder / "failed.json").exists():
        config, told = read_json(folder / "config.json"), public(read_json(folder / "failed.json"))
        train = {key: config["train"][key] for key in ("rate", "seed", "budget", "seconds")}
        return Run({"recipe": config["recipe"], **train, "device": manifest["device"], **told}, failed=True)
    return None


def stage_of(record: dict[str, Any]) -> str:
    """The stage of a record of a study that was begun before records said so."""
    train = record["config"]["train"]
    if not train["seconds"]:
        return "small" if train["split"] == "90/10" else "ablate"
    if train["split"] == "90/1/9":
        return "tune"
    return "seeds" if train["seed"] else "main4" if train["budget"] == 4_000_000 else "main"


def public(value: Any) -> Any:
    """`value` with the last name of every absolute path in its texts: where files lay is nobody's business."""
    if isinstance(value, str):
        return _PATH.sub(r"\1", value)
    if isinstance(value, dict):
        return {key: public(inner) for key, inner in value.items()}
    return [public(inner) for inner in value] if isinstance(value, list) else value


def thinned(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A log of which every kind of line but events has so many lines at most, the last among them; what was left out
    is said in a line before all others. A short one is returned as it is."""
    counts = Counter(line["kind"] for line in lines)
    every = {k: n if k in LAST_ONLY else -(-n // MOST) for k, n in counts.items() if k != "event"}
    kept, left = [], dict(counts)
    for line in lines:
        left[line["kind"]] -= 1
        if left[line["kind"]] % every.get(line["kind"], 1) == 0:
            kept.append(line)
    if len(kept) == len(lines):
        return lines
    now = Counter(line["kind"] for line in kept)
    told = [f"{now[kind]} of {count:,} lines of {kind}" for kind, count in counts.items() if now[kind] < count]
    return [{"kind": "thinned", "message": f"kept {', '.join(told)}, evenly spaced; all others"}, *kept]


def write_record(run: Run, folder: Path) -> None:
    """The files of one run that are kept."""
    assert run.folder is not None
    lines = [public(line) for line in read_json_lines(run.folder / run.record["log"])]
    short = thinned(lines)
    name = "metrics.jsonl" if short is lines else "metrics_thinned.jsonl"
    manifest = public(read_json(run.folder / "manifest.json"))
    shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder)
    write_json(folder / "record.json", run.record | {"log": name})
    write_json(folder / "config.json", run.record["config"])
    write_json(folder / "manifest.json", {key: manifest[key] for key in (*PROVENANCE, "command")})
    with JsonLines(folder / name) as log:
        for line in short:
            log.write(line)


def result_file(runs: list[Run]) -> bytes:
    """The runs of one machine as JSON, a line each."""
    done = packed(sorted((run.record for run in runs if not run.failed), key=_order))
    failed = [run.record for run in runs if run.failed]
    head = [b'{"kind": "budget", "format": 1', b'"common": ' + canonical_json(done["common"])]
    lists = [
        b'"%s": [\n%s]' % (name, b",\n".join(canonical_json(one) for one in found))
        for name, found in ((b"records", done["records"]), (b"failed", failed))
    ]
    return b",\n".join([*head, *lists]) + b"}\n"


def _order(record: dict[str, Any]) -> tuple[Any, ...]:
    train = record["config"]["train"]
    return ORDER.index(record["stage"]), -train["seconds"], record["recipe"], record["rate"], record["seed"]


def collect(places: list[Path], root: Path, date: str) -> Iterator[str]:
    """Write result files and records under `root`; yields what a person should know.

    Raises UserError for a place without records, and if runs in a file of the same date would be lost.
    """
    runs: dict[bytes, Run] = {}
    for place in places:
        for run in runs_of(place):
            runs[canonical_json(run.record) if run.failed else run.identity] = run
    for machine in dict.fromkeys(run.machine for run in runs.values()):
        own = {identity: run for identity, run in runs.items() if run.machine == machine}
        results = make_folder(root / "benchmarks/results")
        target = results / f"budget_{machine}_{date}.json"
        newest = max(results.glob(f"budget_{machine}_*-*-*.json"), default=None)
        lost = [run for run in runs_of(newest) if not run.failed and run.identity not in own] if newest else []
        if newest and lost:
            told = f"{newest.name} has {len(lost)} runs that these sources lack; name it too to keep them on the page"
            if newest == target:
                raise UserError(told)
            yield told
        atomic_write(target, result_file(list(own.values())))
        yield f"{target.relative_to(root)}: {sum(not run.failed for run in own.values())} runs"
        for run in own.values():
            if run.folder is not None and run.record["stage"] in KEPT:
                folder = root / "records" / machine / f"{run.record['stage']}-{run.folder.name}"
                write_record(run, folder)
                yield str(folder.relative_to(root))


def main(arguments: list[str] | None = None) -> int:
    """Collect; 0, or 2 with one line on what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    given = parser.parse_args(arguments)
    try:
        for line in collect(given.places, given.root, given.date):
            print(line)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("now: make readme")
    return 0


if __name__ == "__main__":
    sys.exit(main())
