"""Captions, transcripts, drawn pictures and a mixture, ternary beside float, from frozen features packed beforehand.

    python benchmarks/arb_study.py --pack FEATURES.json … --pictures DATA/fashion-mnist [--text DATA/enwik8.gz]
    python benchmarks/arb_study.py --out FOLDER [--work FOLDER] [--seconds 500] [--only NAME,…] [--size gpu|cpu]
    python benchmarks/arb_study.py --collect RUN… --out FOLDER      # rows of runs that were made by hand
    python benchmarks/arb_study.py --judge NAME.tritwise … --out FOLDER    # figures of rows anew, from their artifacts

`--pack` fills .carry/, below 64 MiB: features as int8 in steps of a twelfth of their channel's deviation, a part of the
spoken digits, 20,000 pictures of Fashion-MNIST, and the first 20 MB of a text for the study of layers. Every item is a
process of its own; WORKERS of them run side by side on each GPU (one on a CPU), the first ones first. An item takes the
steps that it is given, or as many as its share of the seconds allows; then its rate falls by the clock.

FOLDER gets study.json, a row for each item, layers.json, the rows of layers_study.py, both written anew whenever there
is more to tell, a grid of pictures of each first item that draws, and the artifacts of the first captions: at most
eight files. Runs, logs and copies are in the folder --work (FOLDER/work); what is in either file is not done again, so
the same command goes on. An item that no longer fits into the seconds is not begun.
"""

import argparse
import dataclasses
import gzip
import lzma
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from tritwise.data import open_bytes
from tritwise.data.collections import Example
from tritwise.encoders import Features
from tritwise.errors import UserError
from tritwise.files import make_folder, read_json, read_json_lines, write_json
from tritwise.models import Arb, ModelConfig, PartsConfig
from tritwise.ship import read_artifact
from tritwise.train import Config, RunFolder, TrainConfig, train
from tritwise.train.arb_task import ArbTask
from tritwise.train.media_config import MediaConfig
from tritwise.train.tasks import open_task

CARRY = Path(".carry")
WORKERS = 2  # on one GPU: small models keep it waiting for Python, more of them for one another
PICTURES, DIGITS, TEXT = 20_000, 4, 20_000_000
LATE = 45  # seconds after which what still runs is ended
BEFORE, AFTER = 20, 20  # seconds of an item before its first step, and for what is told and judged after the last one
MOST = 1_000_000  # steps of an item that ends by the clock
LINES = 60  # of the course of losses that a row keeps
Settings = dict[str, Any]

TINY: Settings = {"width": 32, "depth": 1, "batch": 4, "draw_width": 32, "draw_depth": 1, "draw_steps": 2}
TINY |= {"eval_examples": 8, "limit": 200}
TRIT: Settings = {"rate": 0.015, "direction": "balanced", "decay": 1.0, "interval": 1}
TRIT |= {"scale_rate": 0.005, "column_scales": True}
FLOAT: Settings = {"weights": "float", "optimizer": "adamw", "rate": 1e-3, "decay": 1.0}
EMOJI: Settings = {"task": "vision", "images": "emoji", "ctx": 96, "noise": 0.15, "hide": 0.1}
EMOJI |= {"width": 256, "depth": 4, "batch": 64, "steps": 5000}
PROMPTS: Settings = {"task": "audio", "sounds": "prompts", "ctx": 192, "ctc": True, "bridge_depth": 3, "noise": 0.2}
PROMPTS |= {"hide": 0.15, "width": 256, "depth": 2, "batch": 16, "steps": 1400}
DRAWN: Settings = {"task": "diffusion", "pictures": "fashion-mnist", "draw_width": 256, "draw_depth": 6, "steps": 6000}
DRAWN |= {"batch": 256, "width": 64, "depth": 1, "judge_pictures": 1000, "guidance": 3.0}
MIXED: Settings = {"width": 256, "depth": 4, "batch": 32, "ctx": 96, "images": "emoji", "sounds": "digits", "hide": 0.1}
MIXED |= {"noise": 0.1, "steps": 900, **TRIT}
ALONE: Settings = {**MIXED, "steps": 300}  # as many batches of its kind as the mixture has on average

# On a CPU steps cost their arithmetic: smaller models, and matrices move at every fourth step, by four times as much.
SMALL: Settings = {"width": 128, "depth": 2, "batch": 32, "interval": 4, "draw_width": 128, "draw_depth": 4}
CPU: dict[str, Settings] = {
    "emoji": {"depth": 4, "steps": 3000},
    "prompts": {"depth": 1, "ctx": 96, "bridge_depth": 2, "batch": 8, "steps": 900},
    "drawn": {"batch": 64, "steps": 2000, "draw_steps": 10},
    "mixture": {"batch": 16, "steps": 600},
    "alone": {"batch": 16, "steps": 200},
}


def items_of() -> dict[str, tuple[float, Settings]]:
    """name -> (seconds of 500 that one of WORKERS processes may take, settings), the most wanted first."""
    seeded: list[tuple[str, float, Settings]] = [
        ("drawn_trit", 130, {**DRAWN, **TRIT}),
        ("emoji_trit", 120, {**EMOJI, **TRIT, "rate": 0.03}),
        ("drawn_float", 130, {**DRAWN, **FLOAT}),
        ("emoji_trit_noisy", 120, {**EMOJI, **TRIT, "rate": 0.03, "noise": 0.3, "hide": 0.2}),
        ("emoji_float", 90, {**EMOJI, **FLOAT}),
        ("prompts_trit", 170, {**PROMPTS, **TRIT, "rate": 0.03, "interval": 4}),
        ("prompts_float", 130, {**PROMPTS, **FLOAT}),
        ("mixture", 110, {**MIXED, "task": "mixture", "mixture": "text=1,vision=1,audio=1"}),
        ("alone_text", 50, {**ALONE, "task": "text"}),
        ("alone_vision", 50, {**ALONE, "task": "vision"}),
        ("alone_audio", 50, {**ALONE, "task": "audio"}),
        ("prompts_float3", 130, {**PROMPTS, **FLOAT, "rate": 3e-3}),
        ("emoji_float3", 100, {**EMOJI, **FLOAT, "rate": 3e-3}),
        ("emoji_trit_dropped1", 120, {**EMOJI, **TRIT, "rate": 0.03, "dropout": 0.1}),
        ("emoji_trit_dropped2", 120, {**EMOJI, **TRIT, "rate": 0.03, "dropout": 0.2}),
        ("emoji_trit_clean", 120, {**EMOJI, **TRIT, "rate": 0.03, "noise": 0.0, "hide": 0.0}),
    ]
    return {f"{name}_seed{seed}": (share, {**own, "seed": seed}) for seed in range(3) for name, share, own in seeded}


ITEMS = items_of()
LAYERS = {"layers_lstm": 90, "layers_moe": 180, "layers_graph": 120}
"""Parts of layers_study.py and their seconds of 500, each in a file of its own in the folder --work."""
FIRST = [name for name in ITEMS if name.endswith("seed0")]
WANTED = [*FIRST[:4], *LAYERS, *FIRST[4:], *(name for name in ITEMS if name not in FIRST)]


def pack(features: list[Path], pictures: Path, text: Path | None) -> None:
    """Fill .carry/ with what the items read."""
    make_folder(CARRY)
    for path in features:
        whole = Features.load(path)
        name = "emoji" if whole.kind == "vision" else "digits" if whole.classes else "prompts"
        train = whole.part("train")
        kept = sorted([*(train[::DIGITS] if name == "digits" else train), *whole.part("val")])
        x_TD = torch.cat([whole.of(index) for index in kept]).float()
        mean_D, scale_D = x_TD.mean(dim=0), x_TD.std(dim=0).clamp(min=1e-3) / 12
        x_TD = ((x_TD - mean_D) / scale_D).round().clamp(-127, 127)
        lengths = torch.tensor([whole.length(index) for index in kept])
        tensors = {"features": x_TD.to(torch.int8), "mean": mean_D, "scale": scale_D, "lengths": lengths}
        tensors |= {f"preview_{kept.index(index)}": preview for index, preview in whole.previews.items()}
        (CARRY / f"{name}.int8.gz").write_bytes(gzip.compress(safetensors.torch.save(tensors), 6))
        facts = {"kind": whole.kind, "about": whole.about, "classes": list(whole.classes)}
        rows = [[e.name, e.text, e.split, e.label] for e in (whole.examples[index] for index in kept)]
        write_json(CARRY / f"{name}.int8.json", facts | {"examples": rows})
    target = make_folder(CARRY / "fashion-mnist")
    for part, count in (("train", PICTURES), ("t10k", 10_000)):
        for kind, head in (("images-idx3", 16), ("labels-idx1", 8)):
            raw = gzip.decompress((pictures / f"{part}-{kind}-ubyte.gz").read_bytes())
            (total,) = struct.unpack(">I", raw[4:8])
            each, count = (len(raw) - head) // total, min(count, total)
            kept_bytes = raw[:4] + struct.pack(">I", count) + raw[8:head] + raw[head : head + count * each]
            (target / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(kept_bytes, 9))
    if text:
        (CARRY / f"{text.name.split('.')[0]}.xz").write_bytes(
            lzma.compress(open_bytes(text)[:TEXT].tobytes(), preset=6)
        )
    size = sum(file.stat().st_size for file in CARRY.rglob("*") if file.is_file())
    print(f"{CARRY}: {size / 2**20:.1f} MiB")


def unpack(name: str, folder: Path) -> None:
    """Features as `tritwise train` reads them, float16 again, from .carry/."""
    path = folder / f"{name}.json"
    if not path.exists():
        tensors = safetensors.torch.load(gzip.decompress((CARRY / f"{name}.int8.gz").read_bytes()))
        told = read_json(CARRY / f"{name}.int8.json")
        x_TD = (tensors["features"].float() * tensors["scale"] + tensors["mean"]).to(torch.float16)
        offsets = [0, *tensors["lengths"].cumsum(0).tolist()]
        previews = {int(key[8:]): tensor for key, tensor in tensors.items() if key.startswith("preview_")}
        examples = [Example(*row) for row in told["examples"]]
        classes = tuple(told["classes"])
        Features(told["kind"], x_TD, offsets, examples, classes, told["about"], previews).save(path)


def settings_of(name: str, size: str, tiny: bool) -> Settings:
    """All settings of an item, the number of its steps and its seed among them."""
    settings = dict(ITEMS[name][1])
    if size == "cpu":
        own = SMALL | CPU[name.split("_")[0]]
        settings |= {key: value for key, value in own.items() if key != "interval" or "direction" in settings}
        if settings["task"] == "diffusion":
            settings |= {"width": 64, "depth": 1}
    if tiny:
        settings |= TINY | ({"judge_pictures": 20} if "judge_pictures" in settings else {})
    return settings


def config_of(settings: Settings, data: Path) -> Config:
    """The config of an item."""
    given, steps = dict(settings), settings["steps"]
    for key in ("images", "sounds"):
        if key in given:
            given[key] = str(data / f"{given[key]}.json")
    if "pictures" in given:
        given["pictures"] = str(CARRY / given["pictures"])
    parts: dict[str, dict[str, Any]] = {}
    given |= {"save": False, "warmup": min(100, steps // 4), "sample_bytes": 0, "eval_bytes": 65536}
    timed = "seconds" in given  # then evaluations would only take time from other items
    given |= {"log_interval": 20 if timed else max(1, steps // LINES), "eval_interval": 0 if timed else steps // 3}
    for name, cls in CLASSES.items():
        fields = {field.name for field in dataclasses.fields(cls)}
        parts[name] = {key: given.pop(key) for key in list(given) if key in fields}
    assert not given, f"no setting is called {list(given)}"
    parts["train"].setdefault("compile", "graph")  # what is compiled costs more time than it saves here
    return Config(
        "custom",
        ModelConfig(vocab=288, **parts["model"]),
        TrainConfig(**parts["train"]),
        PartsConfig(**parts["parts"]),
        MediaConfig(**parts["media"]),
    )


CLASSES: dict[str, Any] = {"model": ModelConfig, "train": TrainConfig, "parts": PartsConfig, "media": MediaConfig}


def run_item(name: str, work: Path, seconds: float, size: str, tiny: bool, gone: float) -> None:
    """Train one item in at most its share of `seconds` (0: in its steps, however long they take), note its row.

    gone: seconds that an attempt to record its steps took and failed; now they are eager. 0: there was none."""
    settings, began = settings_of(name, size, tiny), time.perf_counter()
    if gone:
        settings |= {"compile": "false"} | ({"interval": 4} if "direction" in settings else {})
    if seconds:
        left = ITEMS[name][0] * seconds / 500 - gone - BEFORE - AFTER
        settings |= {"seconds": 2.0 if tiny else max(5.0, left), "steps": MOST}
    elif tiny:
        settings |= {"steps": 60}
    run = work / "runs" / name
    shutil.rmtree(run, ignore_errors=True)
    try:
        train(config_of(settings, work / "data"), run)
    except Exception as error:
        if gone or not torch.cuda.is_available():
            raise
        # Recordings have many ways to fail; eager steps are only slower. A new process has forgotten the failure.
        print(f"not recorded: {type(error).__name__}: {error}", flush=True)
        now = str(1 + time.perf_counter() - began)
        os.execv(sys.executable, [sys.executable, *sys.argv, "--gone", now])
    write_json(run / "row.json", row_of(run))


KEPT = {
    "model": ("width", "depth", "ctx", "weights", "column_scales", "dropout"),
    "train": (
        "steps",
        "seconds",
        "batch",
        "accum",
        "seed",
        "optimizer",
        "rate",
        "direction",
        "decay",
        "interval",
        "scale_rate",
    ),
    "parts": ("vision_layer", "vision_grid", "audio_stride", "bridge_depth", "ctc", "draw_width", "draw_depth"),
    "media": ("task", "mixture", "noise", "hide", "draw_steps", "guidance"),
}


def row_of(run: Path) -> dict[str, Any]:
    """What one finished run says of itself, without paths of this machine. Raises UserError if it is not finished."""
    if not (run / "result.json").exists():
        raise UserError(f"{run} is no finished run; give folders that hold a result.json")
    config, result, audit = (read_json(run / f"{name}.json") for name in ("config", "result", "audit"))
    manifest = read_json(run / "manifest.json")
    settings = {key: config[part][key] for part, keys in KEPT.items() for key in keys if key in config.get(part, {})}
    lines = read_json_lines(run / "metrics.jsonl")
    course = [line for line in lines if line["kind"] == "train"]
    course = course[:: max(1, len(course) // LINES)] + course[-1:]
    told = [
        (line["meant"], line["told"]) for line in lines if line["kind"] == "example" and line["step"] == result["steps"]
    ]
    return {
        "name": run.name,
        "settings": settings,
        "val": result["val"],
        "steps": result["steps"],
        "seconds": result["seconds"],
        "weights": audit["weights"],
        "float_trainable": audit["float_trainable"],
        "state_bytes_per_weight": audit["state_bytes_per_weight"],
        "artifact_bytes": result.get("artifact", {}).get("bytes"),
        "losses": [[line["step"], round(line["loss"], 5), line.get("losses")] for line in course],
        "told": [list(pair) for pair in told],
        "surroundings": {key: manifest[key] for key in ("torch", "python", "cpu", "device", "threads", "git_commit")},
    }


def keep(summary: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows in the order of ITEMS."""
    order = {name: place for place, name in enumerate(ITEMS)}
    rows.sort(key=lambda row: order.get(row["name"], len(order)))
    write_json(summary, {"rows": rows})


def run_all(names: list[str], out: Path, work: Path, seconds: float, others: list[str], tiny: bool) -> int:
    """Every item in a process of its own, the first ones first; returns how many failed."""
    for name in ("emoji", "prompts", "digits"):
        unpack(name, make_folder(work / "data"))
    summary, copy = make_folder(out) / "study.json", work / "study.json"
    layers = LayerRows(out, work)
    known = [row for file in (copy, summary) if file.exists() for row in read_json(file)["rows"]]
    rows = list({row["name"]: row for row in known}.values())
    keep(summary, rows)
    waiting = [name for name in names if name not in {row["name"] for row in rows}]
    gpus = torch.cuda.device_count()
    free = [gpu for _ in range(WORKERS) for gpu in range(gpus)] or [-1]
    running: dict[str, tuple[subprocess.Popen[bytes], int]] = {}
    failed, late, began = [], [], time.perf_counter()
    while waiting or running:
        while waiting and free:
            name, gone = waiting.pop(0), time.perf_counter() - began
            share = (LAYERS[name] if name in LAYERS else ITEMS[name][0]) * seconds / 500
            if seconds and not tiny and gone + share > seconds + 5:
                print(f"{gone:6.1f} s  {name} does not fit any more", flush=True)
                continue
            gpu = free.pop(0)
            command = [
                sys.executable,
                __file__,
                "--item",
                name,
                "--work",
                str(work),
                "--seconds",
                str(seconds),
                *others,
            ]
            if name in LAYERS:
                command = layers.command(name, gpu >= 0, share, tiny)
            places = {"CUDA_VISIBLE_DEVICES": str(gpu), "OMP_NUM_THREADS": "4"} if gpu >= 0 else {}
            log = (make_folder(work / "runs") / f"{name}.log").open("wb")
            running[name] = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | places), gpu
        layers.gather()
        for name, (process, gpu) in list(running.items()):
            if process.poll() is not None:
                del running[name]
                free.append(gpu)
                if process.returncode and name not in late:
                    failed.append(name)
                    print(f"{time.perf_counter() - began:6.1f} s  {name} failed ({process.returncode})")
                    print((work / "runs" / f"{name}.log").read_text(errors="replace")[-1500:])
                elif name in ITEMS and name not in late:
                    run = work / "runs" / name
                    row = read_json(run / "row.json")
                    rows.append(row)
                    for file in (copy, summary):
                        keep(file, rows)
                    for grid in sorted((run / "pictures").glob("diffusion_*.npy"))[-1:] if name in FIRST else ():
                        shutil.copyfile(grid, out / f"{name}.npy")
                    if name in FIRST and name.startswith("emoji_trit"):
                        shutil.copyfile(run / "model.tritwise", out / f"{name}.tritwise")
                    print(
                        f"{time.perf_counter() - began:6.1f} s  {name}: {row['steps']} steps, {row['val']}", flush=True
                    )
        if seconds and time.perf_counter() - began > seconds + LATE and not late:
            late += running
            print(f"{', '.join(late)} took too long and end here", flush=True)
            for process, _ in running.values():
                process.terminate()
        time.sleep(0.2)
    return len(failed)


def judge(artifacts: list[Path], out: Path, work: Path, size: str) -> None:
    """Put the figures of artifacts, called as their items are, in the place of those of their rows."""
    for name in ("emoji", "prompts", "digits"):
        unpack(name, make_folder(work / "data"))
    rows = read_json(out / "study.json")["rows"]
    for file in artifacts:
        task = open_task(config_of(settings_of(file.stem, size, False), work / "data"), print)
        assert isinstance(task, ArbTask)
        model, _ = read_artifact(file)
        assert isinstance(model, Arb)
        (row,) = (row for row in rows if row["name"] == file.stem)
        row["val"] = task.judge.final(model, RunFolder(make_folder(work / file.stem)), torch.device("cpu"))
        print(file.stem, row["val"], flush=True)
    keep(out / "study.json", rows)


class LayerRows:
    """Rows of layers_study.py: a file for each part in `work`, and all of them in out/layers.json as they are made."""

    def __init__(self, out: Path, work: Path) -> None:
        self.out, self.work, self.told = out / "layers.json", work, 0

    def command(self, name: str, gpu: bool, seconds: float, tiny: bool) -> list[str]:
        """How to run a part that begins no row once three quarters of `seconds` are over (0: there is no hurry)."""
        script, texts = Path(__file__).with_name("layers_study.py"), list(CARRY.glob("*.xz"))
        size = ["--device", "cuda", "--size", "gpu"] if gpu else []
        words = [name.removeprefix("layers_"), "--out", self.work / f"{name}.json", "--seconds", 0.75 * seconds, *size]
        words += [*(["--text", texts[0]] if texts else []), *(["--quick"] if tiny else [])]
        return [sys.executable, *map(str, [script, *words])]

    def gather(self) -> None:
        """Write the common file anew if there are more rows."""
        rows = [
            row for name in LAYERS if (file := self.work / f"{name}.json").exists() for row in read_json(file)["rows"]
        ]
        if len(rows) > self.told:
            self.told = len(rows)
            write_json(self.out, {"rows": rows})


def main(arguments: list[str] | None = None) -> int:
    """Read the options and do what they ask; returns how many items failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", nargs="*", type=Path, default=[])
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--collect", nargs="*", type=Path, default=[])
    parser.add_argument("--judge", nargs="*", type=Path, default=[])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--seconds", type=float, default=500.0, help="0: as long as the steps take")
    parser.add_argument("--size", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--only", default=",".join(WANTED))
    parser.add_argument("--item")
    parser.add_argument("--gone", type=float, default=0.0, help="of an item: seconds of an attempt that failed")
    parser.add_argument("--tiny", action="store_true", help="to try it out: nothing is learned")
    given = parser.parse_args(arguments)
    if given.pack:
        pack(given.pack, given.pictures, given.text)
        return 0
    if given.collect:
        summary = make_folder(given.out) / "study.json"
        rows = {row["name"]: row for row in (read_json(summary)["rows"] if summary.exists() else [])}
        keep(summary, list((rows | {run.name: row_of(run) for run in given.collect}).values()))
        return 0
    if given.judge:
        judge(given.judge, given.out, given.work or given.out / "work", given.size)
        return 0
    if given.item:
        run_item(given.item, given.work, given.seconds, given.size, given.tiny, given.gone)
        return 0
    unknown = set(given.only.split(",")) - {*ITEMS, *LAYERS}
    if unknown:
        parser.error(f"there is no item {sorted(unknown)[0]}; choose from {', '.join(ITEMS)}")
    others = ["--size", given.size, *(["--tiny"] if given.tiny else [])]
    work = given.work or given.out / "work"
    return run_all(given.only.split(","), given.out, work, given.seconds, others, given.tiny)


if __name__ == "__main__":
    sys.exit(main())
