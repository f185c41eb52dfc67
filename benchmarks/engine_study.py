"""Everything that is claimed of the engine's speed and memory, measured in one call on one GPU.

    python benchmarks/engine_study.py [STAGE,STAGE…] [--out FOLDER] [--seconds 530] [--data TEXT]

Every stage is a process of its own that writes FOLDER/STAGE.json; one that fails or hangs does not keep the others from
running. Each gets a share of the seconds that are left, so a stage that is soon done leaves more for those after it. At
the end FOLDER/study.json says what each came to, and a table compares with what is aimed at.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

import tritwise
from tritwise.bench.harness import Cell, load_parts, run_cell
from tritwise.files import make_folder, read_json, write_json
from tritwise.ops import backend

GRACE = 25.0  # seconds that a stage may run over its share: what it has begun is to be finished
QUALITY_STEPS, QUALITY_SEEDS = 100, 3


class Stage(NamedTuple):
    """A command of `tritwise bench` (or "quality", of this file), and its share of the time against the others'."""

    share: float
    command: list[str]


# In order of importance, should time run out.
ALL_OF_THEM = "ours-turns-fp8,adamw-bf16,ours-fp8,ours,adamw,muon,bitnet,ours-compact"
FAST = "ours-turns-fp8"
STAGES = {
    # Compiled block by block: as one, its four kinds of model take minutes to compile.
    "step-19m": Stage(
        0.12,
        [
            *("step", "--size", "19m", "--mode", "blocks-graph", "--rounds", "9", "--steps", "10"),
            *("--contenders", f"ours-turns,{ALL_OF_THEM}"),
        ],
    ),
    "step-124m": Stage(0.10, ["step", "--size", "124m", "--rounds", "7", "--steps", "4", "--contenders", ALL_OF_THEM]),
    "step-124m-long": Stage(
        0.04,
        [
            *("step", "--size", "124m", "--accum", "2", "--rounds", "5", "--steps", "4"),
            *("--contenders", f"{FAST},adamw-bf16,ours-fp8,ours"),
        ],
    ),
    "step-1.3b": Stage(0.24, ["step", "--size", "1.3b", "--rounds", "5", "--steps", "2", "--contenders", ALL_OF_THEM]),
    "memory-3b": Stage(
        0.08,
        [
            *("step", "--size", "3b", "--batch", "1", "--accum", "1", "--mode", "eager", "--checkpoint"),
            *("--contenders", "ours,ours-compact", "--one-by-one", "--rounds", "1", "--steps", "8"),
        ],
    ),
    "kernels": Stage(0.08, ["kernels"]),
    "quality": Stage(0.08, ["quality"]),
    "capacity": Stage(0.26, ["capacity", "--contenders", "ours,adamw-bf16,adamw", "--tolerance", "0.08"]),
}


def run_stages(names: list[str], out: Path, seconds: float, data: str) -> dict[str, dict[str, Any]]:
    """Run the stages one after the other; what each came to."""
    until, told = time.monotonic() + seconds, {}
    for number, name in enumerate(names):
        left = until - time.monotonic()
        waiting = sum(STAGES[other].share for other in names[number:])
        budget = left * STAGES[name].share / waiting
        limit = min(budget + GRACE, left)
        (out / f"{name}.json").unlink(missing_ok=True)  # of an earlier call
        if limit < 5:
            told[name] = {"seconds": 0.0, "code": None, "said": "left out: the time was up"}
        else:
            told[name] = run_limited(_command(name, out, max(budget - 5, 1), data), limit)
        print(f"{name}: code {told[name]['code']}, {told[name]['seconds']:.0f} s", flush=True)
        if told[name]["code"] != 0:
            print(told[name]["said"], flush=True)
        write_json(out / "study.json", {"stages": told})
    return told


def _command(name: str, out: Path, seconds: float, data: str) -> list[str]:
    file, (kind, *rest) = out / f"{name}.json", STAGES[name].command
    if kind == "quality":
        return [sys.executable, __file__, "--quality", str(file), "--data", data]
    options = ["--seconds", f"{seconds:.0f}", "--out", str(file)]
    options += [] if kind == "kernels" else ["--data", data]
    return [sys.executable, "-m", "tritwise", "bench", kind, *rest, *options]


def run_limited(command: list[str], limit: float) -> dict[str, Any]:
    """Run a command and all that it starts for at most `limit` seconds. code: None if it had to be ended."""
    packages = str(Path(tritwise.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (packages, os.environ.get("PYTHONPATH"))))
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "100"},
        start_new_session=True,
    )
    try:
        said, code = process.communicate(timeout=limit)[0], process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, code = process.communicate()[0] + "\nended: the time was up", None
    return {"seconds": time.monotonic() - began, "code": code, "said": said[-6000:]}


def quality(file: Path, data: str) -> None:
    """A short run of the 19.1M-weight model by the kernels and by the reference, over seeds: bits per byte of each."""
    cuda = torch.cuda.is_available()
    shape: dict[str, Any] = {"width": 512, "depth": 6, "ctx": 512, "batch": 64, "steps": QUALITY_STEPS}
    if not cuda:
        shape = {"steps": 3}
    split = "90/10" if data == "shakespeare" else "first:38000000,last:2000000"
    dtype = "bfloat16" if cuda else "float32"
    cell = Cell("ours", 0.03, data=data, split=split, warmup=10, decay=1.0, dtype=dtype, **shape)
    parts = load_parts(cell.data, cell.split, cell.batch, cell.ctx)
    rows: list[dict[str, Any]] = []
    for seed in range(QUALITY_SEEDS):
        for name in ("triton" if cuda else "cpu", "reference"):
            with backend(name):
                row = run_cell(replace(cell, seed=seed), parts, "cuda:0" if cuda else "cpu")
            rows.append(
                {key: row[key] for key in ("seed", "val_bpb", "step_ms", "steps", "device")} | {"backend": name}
            )
            write_json(file, {"bench": "quality", "rows": rows})


Reader = Callable[[dict[str, Any]], float | None]


def _of(contender: str, key: str) -> Reader:
    def read(result: dict[str, Any]) -> float | None:
        return next((row.get(key) for row in result["rows"] if row["contender"] == contender), None)

    return read


def _memory(result: dict[str, Any]) -> float | None:
    """GB of the whole device in use, if the loss fell."""
    row = next((row for row in result["rows"] if row["contender"] == "ours"), {})
    fell = row.get("last_loss") is not None and row["last_loss"] < row["first_loss"]
    return row["device_bytes"] / 1e9 if fell and row.get("device_bytes") else None


def _wrong(result: dict[str, Any]) -> float:
    return float(sum(not row["correct"] for row in result["rows"]))


def _largest(result: dict[str, Any]) -> float | None:
    row = next((row for row in result["rows"] if row["contender"] == "ours"), {})
    return row["largest"]["weights"] / 1e9 if row.get("largest") else None


def _apart(result: dict[str, Any]) -> float | None:
    """How far the kernels' bits per byte are from the reference's, in spreads between seeds."""
    by_backend: dict[str, list[float]] = {}
    for row in result["rows"]:
        if row["val_bpb"] is not None:
            by_backend.setdefault(row["backend"], []).append(row["val_bpb"])
    if len(by_backend) < 2 or len(rows := next(iter(by_backend.values()))) < 2:
        return None
    one, two = (fmean(values) for values in by_backend.values())
    return abs(one - two) / max(max(rows) - min(rows), 1e-4)


TARGETS: list[tuple[str, str, Reader, str, float]] = [
    ("kernels that are not the reference's", "kernels", _wrong, "at most", 0),
    *(
        (f"speed over bf16 AdamW, {size}, {name}", f"step-{size}", _of(name, "ratio"), "at least", 1.0)
        for size in ("19m", "124m", "124m-long", "1.3b")
        for name in ("ours", "ours-fp8", FAST)
    ),
    ("the update's share of a step, 1.3b", "step-1.3b", _of("ours", "update_share"), "at most", 0.15),
    ("GB of the device, 3b, loss falling", "memory-3b", _memory, "at most", 8.0),
    ("largest model, 10^9 weights", "capacity", _largest, "at least", 28.0),
    ("bpb from the reference's, in seed spreads", "quality", _apart, "at most", 1.0),
]


def summary(out: Path) -> list[dict[str, Any]]:
    """What is aimed at and what was measured, of the stages whose files are there."""
    lines = []
    for what, stage, read, bound, aim in TARGETS:
        file = out / f"{stage}.json"
        value = read(read_json(file)) if file.exists() else None
        met = None if value is None else value >= aim if bound == "at least" else value <= aim
        lines.append({"what": what, "stage": stage, "measured": value, "bound": bound, "aim": aim, "met": met})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stages", nargs="?", default=",".join(STAGES), help=f"some of {', '.join(STAGES)}")
    parser.add_argument("--out", type=Path, default=Path("runs/engine-study"))
    parser.add_argument("--seconds", type=float, default=530.0, help="for all stages together")
    parser.add_argument("--data", default="shakespeare", help="text to learn")
    parser.add_argument("--quality", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quality:
        quality(options.quality, options.data)
        return
    names = options.stages.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(f"there is no stage {unknown[0]!r}; choose of {', '.join(STAGES)}")
    make_folder(options.out)
    told = run_stages(names, options.out, options.seconds, options.data)
    lines = summary(options.out)
    write_json(options.out / "study.json", {"stages": told, "summary": lines})
    for line in lines:
        measured = "not measured" if line["measured"] is None else f"{line['measured']:.4g}"
        verdict = {True: "met", False: "NOT MET", None: ""}[line["met"]]
        print(f"{line['what']:45} {measured:>13}   {line['bound']} {line['aim']:g}  {verdict}")
    print(json.dumps(lines))


if __name__ == "__main__":
    main()
