"""Captions, transcripts, drawn pictures and a mixture, ternary beside float, on one GPU in five minutes.

    python benchmarks/arb_study.py --pack FEATURES.json … --pictures DATA/fashion-mnist     # here: fills .carry/
    python benchmarks/arb_study.py --out FOLDER [--seconds 270] [--only NAME,…]              # on the GPU: trains

`--pack` writes features as int8 with a scale for each channel, and 20,000 of the pictures, so that all of it is below
60 MiB. Every item is a process of its own; WORKERS of them run side by side, because small models keep a GPU waiting
for Python. Each takes as many steps as its share of the seconds allows, measured at its start. What has come of them is
one file, FOLDER/study.json, written anew whenever an item ends; what is in it is not done again. Runs stay below
FOLDER/runs.
"""

import argparse
import dataclasses
import gzip
import json
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from tritwise.data.collections import Example
from tritwise.encoders import Features
from tritwise.files import make_folder, read_json, read_json_lines, write_json
from tritwise.models import ModelConfig, PartsConfig
from tritwise.train import Config, TrainConfig, train
from tritwise.train.media_config import MediaConfig
from tritwise.train.progress import Quiet

CARRY = Path(".carry")
WORKERS = 3
TINY = {"width": 32, "depth": 1, "batch": 4, "draw_width": 32, "draw_depth": 1, "draw_steps": 2, "eval_examples": 8}
PICTURES = 20_000
FLOAT = {"weights": "float", "optimizer": "adamw"}

# Matrices move at every fourth step, by four times as much: on a GPU their directions are most of a step.
TRUNK = {"width": 256, "depth": 4, "batch": 64, "interval": 4}
EMOJI: dict[str, Any] = {"task": "vision", "images": "emoji", "ctx": 96, "bridge_depth": 1, **TRUNK}
PROMPTS: dict[str, Any] = {"task": "audio", "sounds": "prompts", "ctx": 192, "ctc": True, "bridge_depth": 3, **TRUNK}
PROMPTS |= {"depth": 2, "batch": 16}
DRAWN: dict[str, Any] = {"task": "diffusion", "pictures": "fashion-mnist", "draw_width": 256, "draw_depth": 6}
DRAWN |= {"batch": 256, "width": 64, "depth": 1, "judge_pictures": 1000, "interval": 4, "compile": "auto"}
MIXED: dict[str, Any] = {"width": 256, "depth": 4, "batch": 32, "ctx": 192, "images": "emoji", "sounds": "prompts"}
MIXED |= {"bridge_depth": 2, "ctc": True, "interval": 4}

# name -> (share of a worker's seconds, settings). A share of 1 is one of WORKERS processes for the whole time.
ITEMS: dict[str, tuple[float, dict[str, Any]]] = {
    "drawn_trit": (0.75, {**DRAWN, "rate": 0.015}),
    "drawn_float": (0.75, {**DRAWN, **FLOAT, "rate": 1e-3}),
    "emoji_trit": (0.33, {**EMOJI, "rate": 0.015}),
    "emoji_trit_slow": (0.33, {**EMOJI, "rate": 0.008, "noise": 0.3, "hide": 0.3}),
    "emoji_trit_noise": (0.33, {**EMOJI, "rate": 0.015, "noise": 0.3, "hide": 0.3}),
    "emoji_float": (0.33, {**EMOJI, **FLOAT, "rate": 1e-3, "noise": 0.3, "hide": 0.3}),
    "prompts_trit": (0.33, {**PROMPTS, "rate": 0.015}),
    "prompts_trit_noise": (0.33, {**PROMPTS, "rate": 0.015, "noise": 0.3, "hide": 0.2}),
    "prompts_trit_slow": (0.33, {**PROMPTS, "rate": 0.008, "noise": 0.3, "hide": 0.2}),
    "prompts_float": (0.33, {**PROMPTS, **FLOAT, "rate": 1e-3}),
    "prompts_float_noise": (0.33, {**PROMPTS, **FLOAT, "rate": 1e-3, "noise": 0.3, "hide": 0.2}),
    "mixture": (0.5, {**MIXED, "task": "mixture", "mixture": "text=1,vision=1,audio=1", "rate": 0.015}),
    "alone_text": (0.17, {**MIXED, "task": "text", "rate": 0.015}),
    "alone_vision": (0.17, {**MIXED, "task": "vision", "rate": 0.015}),
    "alone_audio": (0.17, {**MIXED, "task": "audio", "rate": 0.015}),
}


def pack(features: list[Path], pictures: Path) -> None:
    """Fill .carry/ with what the items read."""
    make_folder(CARRY)
    for path in features:
        whole = Features.load(path)
        name = {"vision": "emoji", "audio": "prompts"}[whole.kind]
        x_TD = torch.cat([whole.of(index) for index in range(len(whole))]).float()
        scale_D = x_TD.abs().amax(dim=0) / 127
        lengths = torch.tensor([whole.length(index) for index in range(len(whole))])
        tensors = {"features": (x_TD / scale_D).round().to(torch.int8), "scale": scale_D, "lengths": lengths}
        tensors |= {f"preview_{index}": preview for index, preview in whole.previews.items()}
        safetensors.torch.save_file(tensors, CARRY / f"{name}.int8.safetensors")
        facts = {"kind": whole.kind, "about": whole.about, "classes": list(whole.classes)}
        rows = [[e.name, e.text, e.split, e.label] for e in whole.examples]
        write_json(CARRY / f"{name}.int8.json", facts | {"examples": rows})
    target = make_folder(CARRY / "fashion-mnist")
    for part, count in (("train", PICTURES), ("t10k", 10_000)):
        for kind, head in (("images-idx3", 16), ("labels-idx1", 8)):
            raw = gzip.decompress((pictures / f"{part}-{kind}-ubyte.gz").read_bytes())
            (total,) = struct.unpack(">I", raw[4:8])
            each = (len(raw) - head) // total
            kept = raw[:4] + struct.pack(">I", count) + raw[8:head] + raw[head : head + count * each]
            (target / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(kept, 9))
    size = sum(file.stat().st_size for file in CARRY.rglob("*") if file.is_file())
    print(f"{CARRY}: {size / 2**20:.1f} MiB")


def unpack(name: str, folder: Path) -> Path:
    """Features as `tritwise train` reads them, float16 again, from .carry/."""
    path = folder / f"{name}.json"
    if not path.exists():
        tensors = safetensors.torch.load_file(CARRY / f"{name}.int8.safetensors")
        told = read_json(CARRY / f"{name}.int8.json")
        x_TD = (tensors["features"].float() * tensors["scale"]).to(torch.float16)
        offsets = [0, *tensors["lengths"].cumsum(0).tolist()]
        previews = {int(key[8:]): tensor for key, tensor in tensors.items() if key.startswith("preview_")}
        examples = [Example(*row) for row in told["examples"]]
        classes = tuple(told["classes"])
        Features(told["kind"], x_TD, offsets, examples, classes, told["about"], previews).save(path)
    return path


def config_of(settings: dict[str, Any], data: Path, steps: int, seed: int) -> Config:
    """The config of an item."""
    given = dict(settings)
    for key in ("images", "sounds"):
        if key in given:
            given[key] = str(data / f"{given[key]}.json")
    if "pictures" in given:
        given["pictures"] = str(CARRY / given["pictures"])
    parts: dict[str, dict[str, Any]] = {}
    every = max(1, steps // 40)
    given = {"compile": "false", **given, "steps": steps, "seed": seed, "save": False, "log_interval": every}
    given |= {"warmup": min(50, steps // 4)}
    given |= {"eval_interval": max(1, steps // 4), "eval_bytes": 65536, "sample_bytes": 0}
    for name, cls in (("model", ModelConfig), ("train", TrainConfig), ("parts", PartsConfig), ("media", MediaConfig)):
        fields = {field.name for field in dataclasses.fields(cls)}
        parts[name] = {key: given.pop(key) for key in list(given) if key in fields}
    assert not given, f"no setting is called {list(given)}"
    parts["model"]["vocab"] = 288
    return Config(
        "custom",
        ModelConfig(**parts["model"]),
        TrainConfig(**parts["train"]),
        PartsConfig(**parts["parts"]),
        MediaConfig(**parts["media"]),
    )


class Clock(Quiet):
    """Remembers the pace of the last log line."""

    seconds = 0.0

    def record(self, record: dict[str, Any]) -> None:
        if record["kind"] == "train":
            self.seconds = record["step_seconds"]


def measure(settings: dict[str, Any], out: Path, seed: int, clock: Clock) -> None:
    """Let `clock` tell the pace of an item: its first lines hold the compilation of kernels, its last one does not."""
    short = config_of({**settings, "judge_pictures": 0}, out / "data", 30, seed)
    quick = dataclasses.replace(short.train, log_interval=10, eval_interval=0)
    with tempfile.TemporaryDirectory() as folder:
        train(dataclasses.replace(short, train=quick), Path(folder) / "pace", display=clock)


def run_item(name: str, out: Path, seconds: float, seed: int, tiny: bool) -> None:
    """Train one item for about its share of `seconds`, and write down what came of it."""
    share, settings = ITEMS[name]
    if tiny:
        settings = {**settings, **TINY} | ({"judge_pictures": 20} if "judge_pictures" in settings else {})
    began = time.perf_counter()
    clock = Clock()
    try:
        measure(settings, out, seed, clock)
    except Exception as error:  # torch.compile has many ways to fail; eager steps are only slower
        if settings.get("compile", "false") == "false":
            raise
        print(f"not compiled: {error}")
        settings = {**settings, "compile": "false"}
        measure(settings, out, seed, clock)
    left = share * seconds - (time.perf_counter() - began) - 8
    steps = max(60, min(20_000, int(0.85 * left / clock.seconds)))
    run = out / "runs" / name
    result = train(config_of(settings, out / "data", steps, seed), run)
    lines = read_json_lines(run / "metrics.jsonl")
    told = {
        "name": name,
        "seed": seed,
        "settings": settings,
        "result": result,
        "float_trainable": read_json(run / "audit.json")["float_trainable"],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "train": [
            {key: line[key] for key in ("step", "loss", "losses") if key in line}
            for line in lines
            if line["kind"] == "train"
        ],
        "eval": [line for line in lines if line["kind"] == "eval"],
        "examples": [line for line in lines if line["kind"] == "example" and line["step"] == steps],
        "seconds": round(time.perf_counter() - began, 1),
    }
    write_json(run / "told.json", told)


def run_all(names: list[str], out: Path, seconds: float, others: list[str]) -> int:
    """Every item in a process of its own, WORKERS at a time, the long ones first."""
    for name in ("emoji", "prompts"):
        unpack(name, make_folder(out / "data"))
    summary = out / "study.json"
    known: dict[str, Any] = read_json(summary) if summary.exists() else {}
    waiting = [name for name in names if name not in known]
    waiting.sort(key=lambda name: -ITEMS[name][0])
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed, began = [], time.perf_counter()
    while waiting or running:
        while waiting and len(running) < WORKERS:
            name = waiting.pop(0)
            command = [sys.executable, __file__, "--item", name, "--out", str(out), "--seconds", str(seconds)]
            log = (make_folder(out / "runs") / f"{name}.log").open("wb")
            running[name] = subprocess.Popen([*command, *others], stdout=log, stderr=log)
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                if process.returncode:
                    failed.append(name)
                else:
                    known[name] = read_json(out / "runs" / name / "told.json")
                    write_json(summary, known)
                print(f"{time.perf_counter() - began:6.1f} s  {name} {'failed' if process.returncode else 'done'}")
        time.sleep(0.2)
    print(json.dumps({name: told["result"]["val"] for name, told in known.items()}, indent=1))
    for path in (out / "data").glob("*.safetensors"):
        path.unlink()  # they came from here and need not travel back
    return len(failed)


def main(arguments: list[str] | None = None) -> int:
    """Read the options and do what they ask; returns how many items failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", nargs="*", type=Path, default=[])
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=270.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(ITEMS))
    parser.add_argument("--item")
    parser.add_argument("--tiny", action="store_true", help="to try it out: nothing is learned")
    given = parser.parse_args(arguments)
    if given.pack:
        pack(given.pack, given.pictures)
        return 0
    if given.item:
        run_item(given.item, given.out, given.seconds, given.seed, given.tiny)
        return 0
    others = ["--seed", str(given.seed), *(["--tiny"] if given.tiny else [])]
    return run_all(given.only.split(","), given.out, given.seconds, others)


if __name__ == "__main__":
    sys.exit(main())
