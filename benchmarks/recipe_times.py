"""How long every trainer of ARB models takes with its recipe on this machine, as whole commands.

python benchmarks/recipe_times.py OUT.json --images EMOJI --sounds DIGITS --pictures FASHION-MNIST
    --vision-encoder DINOV2 --audio-encoder WHISPER [--work FOLDER] [--only train-text,…]

One command after the other, nothing beside them: `tritwise train` of each kind, `pretrain`, and `finetune` of each kind
from the mixture's run. Features of frozen encoders are computed once, by the first command that reads them, in a cache
of their own: they are in that command's "before_seconds", what passed before the first step. OUT.json is written anew
after every command, so that a cut-off study keeps what it has; what is in it is not run again.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import tritwise
from tritwise.files import read_json, write_json
from tritwise.train.run import surroundings


def commands(given: argparse.Namespace, work: Path) -> dict[str, list[str]]:
    """Name -> the arguments of `tritwise`, in the order in which they are to run."""
    images, sounds = ["--data", given.images], ["--data", given.sounds]
    see, hear = ["--encoder", given.vision_encoder], ["--encoder", given.audio_encoder]
    draws = ["--data", given.pictures]
    own: dict[str, list[str]] = {"text": [], "vision": [*images, *see], "audio": [*sounds, *hear], "diffusion": draws}
    made = {f"train-{kind}": ["train", kind, *options] for kind, options in own.items()}
    made["pretrain"] = ["pretrain", "--images", given.images, "--sounds", given.sounds]
    made["pretrain"] += ["--vision-encoder", given.vision_encoder, "--audio-encoder", given.audio_encoder]
    starts = {"text": "pretrain", "vision": "pretrain", "audio": "pretrain", "diffusion": "train-diffusion"}
    for kind, options in own.items():
        made[f"finetune-{kind}"] = ["finetune", kind, "--start", str(work / starts[kind]), *options]
    steps = ["--steps", str(given.steps)] if given.steps else []
    return {name: [*arguments, *steps, "--out", str(work / name)] for name, arguments in made.items()}


def timed(name: str, arguments: list[str], work: Path, cache: Path) -> dict[str, Any]:
    """Run one command; its row. RuntimeError with the end of what it said if it failed."""
    shutil.rmtree(work / name, ignore_errors=True)
    packages = str(Path(tritwise.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (packages, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"TRITWISE_CACHE": str(cache), "PYTHONPATH": path}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "tritwise", *arguments], env=environment, capture_output=True, text=True
    )
    seconds = time.monotonic() - began
    if done.returncode:
        raise RuntimeError(f"{name} ended with code {done.returncode}: {(done.stderr or done.stdout)[-1500:]}")
    result, audit = read_json(work / name / "result.json"), read_json(work / name / "audit.json")
    return {
        "name": name,
        "seconds": round(seconds, 1),
        "steps": result["steps"],
        "training_seconds": round(result["seconds"], 1),
        "before_seconds": round(seconds - result["seconds"] - result["seconds_after"], 1),
        "weights": audit["weights"],
        "float_trainable": audit["float_trainable"],
        "surroundings": surroundings(torch.device("cpu")),
    }


def main(arguments: list[str] | None = None) -> None:
    """Run what has not been run, in order."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    for name in ("--images", "--sounds", "--pictures", "--vision-encoder", "--audio-encoder"):
        parser.add_argument(name, required=True)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--steps", type=int, help="of every command, to try it out")
    given = parser.parse_args(arguments)
    work = given.work or Path(tempfile.mkdtemp(prefix="recipes-"))
    todo = commands(given, work)
    wanted = given.only.split(",") if given.only else list(todo)
    rows = read_json(given.out)["rows"] if given.out.exists() else []
    for name in wanted:
        if name not in {row["name"] for row in rows}:
            rows.append(timed(name, todo[name], work, work / "cache"))
            write_json(given.out, {"rows": rows})
            print(f"{name}: {rows[-1]['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
