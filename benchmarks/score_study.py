"""Everything that is claimed of scoring and compression, measured in one call: for one model and one text.

    python benchmarks/score_study.py --preset shakespeare --out runs/score-study          two cores, about half an hour
    python benchmarks/score_study.py --preset enwik8 --data enwik8.gz --seconds 580 --out FOLDER      one H100

The model is trained by the preset, shipped, and read back from its file, or it is the artifact --model. Each item is a
process of its own (on a GPU a few share one) and writes FOLDER/ITEM.json; what is there already is not measured again,
so a call that was cut off is called again. At the end FOLDER/study.json holds all of it.

    train      a model, shipped                        peers     xz, zstd and bzip2 on the same text
    windows    chunked and sliding, by stride          agree     sliding, streaming and full context
    cheats     four, and what each would have claimed  bad       what decompress and score do with bad input
    compress   and decompress, bytes on disk           repeat    the same bytes again, with other threads
    compare    with a 5-gram, byte by byte (not on a GPU)
    decode     of what learns while reading: coded and decoded, the first bytes (not on a GPU)
    mix, adapt, scales, both   learning while reading, beside the same stream without it

On a GPU some items run beside others (`GROUPS`). A slow item reads the first bytes of the part only, as many as its
share of --seconds allows; its row says how many.
"""

import argparse
import dataclasses
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compress_items import bad_item, compress_item, decode_item, peers_item, repeat_item
from engine_study import run_limited
from score_items import Task, agree_item, cheats_item, compare_item, learn_item, windows_item

from tritwise.data.sampler import Sampler
from tritwise.data.source import describe
from tritwise.data.split import named_part, split
from tritwise.files import make_folder, read_json, write_json
from tritwise.models import ModelConfig
from tritwise.nn import trit_modules
from tritwise.optim import rate_factor
from tritwise.recipes import recipe
from tritwise.score.learning import Learning
from tritwise.ship import read_artifact
from tritwise.train import Config, TrainConfig
from tritwise.train.device import batch_on, build_model, device_called, speed_of, wait_for
from tritwise.train.finish import ship_and_reread
from tritwise.train.optimizers import build_optimizers, set_rates
from tritwise.train.run import manifest, surroundings
from tritwise.train.stepper import Stepper

# The rule with the settings that won at this size (docs/LOG.md): they are not those of the small recipes.
ENWIK8 = Config(
    "enwik8",
    ModelConfig(width=512, depth=6, ctx=512, column_scales=True),
    TrainConfig(
        data="enwik8", split="90/5/5", steps=3600, batch=64, rate=0.03, direction="balanced", scale_rate=0.005,
        decay=1.0, warmup=100, interval=1,
    ),
)  # fmt: skip
PRESETS: dict[str, Callable[[], Config]] = {
    "enwik8": lambda: ENWIK8,
    "shakespeare": lambda: recipe("shakespeare"),
    "tiny": lambda: recipe("tiny"),
}
LEARN = {
    "mix": Learning(mix=True),
    "adapt": Learning(adapt="all"),
    "scales": Learning(adapt="scales"),
    "both": Learning(adapt="all", mix=True),
}


def train_item(task: Task) -> dict[str, Any]:
    """Train the preset's model and ship it. Its own loop: `train` also draws the ladder, which takes a minute."""
    config, device = task.config, task.device
    settings = config.train
    parts = split(describe(settings.data).data, settings.split)
    torch.manual_seed(settings.seed)
    model = build_model(config, device)
    optimizers = build_optimizers(model, settings)
    sampler = Sampler(parts["train"], settings.batch, config.model.ctx, settings.seed)
    stepper = Stepper(model, optimizers, **speed_of(settings.compile, model)._asdict(), guard=True, seed=settings.seed)
    began, curve, first_step = time.perf_counter(), [], 0.0
    for step in range(settings.steps):
        set_rates(optimizers, rate_factor(step, settings.steps, settings.warmup, settings.decay))
        loss = stepper.step(*batch_on(device, sampler, step))
        if step in (0, settings.steps - 1) or step % max(1, settings.steps // 50) == 0:
            curve.append([(step + 1) * settings.batch * config.model.ctx, float(loss)])
            first_step = first_step or time.perf_counter() - began
    wait_for(device)
    seconds = time.perf_counter() - began
    about = {"steps": settings.steps, "seconds": round(seconds, 3)}
    info, _, found = ship_and_reread(model, task.artifact, config, task.text[: 1 << 20], about, device)
    return {
        "steps": settings.steps,
        "bytes_seen": settings.steps * settings.batch * config.model.ctx,
        "seconds": seconds,
        "seconds_to_first_step": first_step,
        "weights": info.weights,
        "artifact_bytes": info.bytes,
        "bits_per_weight": 8 * info.bytes / info.weights,
        "dtype": str(model.dtype).removeprefix("torch."),
        "bpb_of_first_mib_as_trained": found.bpb,
        "curve": curve,
        "config": dataclasses.replace(
            config,
            train=dataclasses.replace(settings, data=Path(settings.data).name),  # no private paths
        ).as_dict(),
    }


ITEMS: dict[str, Callable[[Task], dict[str, Any]]] = {
    "train": train_item,
    "peers": peers_item,
    "windows": windows_item,
    "agree": agree_item,
    "cheats": cheats_item,
    "compare": compare_item,
    "compress": compress_item,
    "repeat": repeat_item,
    "bad": bad_item,
    "decode": lambda task: decode_item(task, LEARN),
    **{name: lambda task, how=how: learn_item(task, how) for name, how in LEARN.items()},
}
Chain = tuple[str, ...]
START = 12.0  # seconds of a process before its first item
# Chains of a group run beside each other, the items of a chain one after the other in one process. Beside each other
# stand only what nobody times and what needs another processor. Numbers: shares of the seconds.
SHARES = {
    "train": 0.20, "peers": 0.0, "windows": 0.06, "agree": 0.05, "cheats": 0.01, "compare": 0.02, "bad": 0.0,
    "decode": 0.03, "compress": 0.50, "repeat": 0.03, "mix": 0.05, "adapt": 0.06, "scales": 0.04, "both": 0.0,
}  # fmt: skip
GROUPS: dict[str, list[list[Chain]]] = {
    "cpu": [[(name,)] for name in ITEMS],
    "cuda": [
        [("train", "windows", "agree", "cheats"), ("peers",)],
        [("compress",), ("bad",)],
        [("mix", "adapt", "scales", "repeat")],
    ],
}
CPU_SHARES = SHARES | {
    "train": 0.15,
    "compress": 0.15,
    "mix": 0.1,
    "both": 0.1,
    "adapt": 0.12,
    "bad": 0.03,
    "peers": 0.02,
}


def run_groups(names: list[str], options: argparse.Namespace) -> None:
    """Every item that is not there yet, group after group; one that fails or hangs does not keep other chains back."""
    until = time.monotonic() + options.seconds
    shares = CPU_SHARES if options.groups == "cpu" else SHARES
    missing = [name for name in names if not (options.out / f"{name}.json").exists()]
    groups = [[tuple(n for n in chain if n in missing) for chain in group] for group in GROUPS[options.groups]]
    groups = [[chain for chain in group if chain] for group in groups]
    weights = [max((sum(shares[name] for name in chain) for chain in group), default=0.0) for group in groups]
    for number, group in enumerate(groups):
        left = until - time.monotonic()
        budget = left * weights[number] / max(sum(weights[number:]), 1e-9)

        def run(chain: Chain, budget: float = budget, left: float = left) -> None:
            whole = sum(shares[name] for name in chain)
            ready = max(budget - START, 1.0)
            parts = [ready * (shares[name] / whole if whole else 1 / len(chain)) for name in chain]
            asked = [f"--item={','.join(chain)}", f"--budget={','.join(f'{part:.1f}' for part in parts)}"]
            told = run_limited([sys.executable, *sys.argv, *asked], max(left, 1.0))
            print(f"{' '.join(chain)}: code {told['code']}, {told['seconds']:.1f} s of {budget:.0f}", flush=True)
            if told["code"] != 0:
                print(told["said"][-3000:], flush=True)

        if group:
            with ThreadPoolExecutor(len(group)) as pool:
                list(pool.map(run, group))


def run_chain(options: argparse.Namespace, config: Config, device: torch.device) -> int:
    """Some items in this process, each into its own file; how many failed."""
    parts = split(describe(config.train.data).data, options.split or config.train.split)
    text = np.array(named_part(parts, options.part)[: options.bytes or None])
    failed = 0
    for name, budget in zip(options.item.split(","), options.budget.split(","), strict=True):
        on = torch.device("cpu") if name == "bad" else device
        task, began = (
            Task(config, options.model, text, on, float(budget), parts["train"], options.lanes),
            time.perf_counter(),
        )
        try:
            found = ITEMS[name](task)
        except Exception:  # the next item may well work
            traceback.print_exc()
            failed += 1
            continue
        about = {"item_seconds": time.perf_counter() - began, "where": surroundings(on)}
        write_json(options.out / f"{name}.json", found | about)
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
    return failed


def collect(options: argparse.Namespace, config: Config, device: torch.device) -> dict[str, Any]:
    """All items that are there, as one record. One that is there already keeps its manifest: an item measured elsewhere
    may have been put beside the others, and says itself where."""
    whole = options.out / "study.json"
    found = {name: read_json(options.out / f"{name}.json") for name in ITEMS if (options.out / f"{name}.json").exists()}
    about = {
        "bench": "score",
        "preset": options.preset,
        "data": Path(config.train.data).name,
        "split": options.split or config.train.split,
    }
    record = about | {
        "part": options.part,
        "bytes": options.bytes,
        "artifact": _about(options.model) if options.model.exists() else None,
        "manifest": read_json(whole)["manifest"] if whole.exists() else manifest(config, device),
        "items": found,
    }
    record["manifest"]["command"] = [Path(word).name for word in record["manifest"]["command"]]  # no private paths
    write_json(whole, record)
    return record


def _about(artifact: Path) -> dict[str, Any]:
    """The artifact's size, its shape, and what it says of itself."""
    model, header = read_artifact(artifact)
    weights = sum(layer.register.numel() for _, layer in trit_modules(model))
    shape = dataclasses.asdict(model.config)
    return {"bytes": artifact.stat().st_size, "weights": weights, "model": shape, "about": header["about"]}


def main() -> int:
    """Run the items, or one of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    parser.add_argument("--model", type=Path, help="an artifact; left out: trained into OUT/model.tritwise")
    parser.add_argument("--data", help="text [the preset's]")
    parser.add_argument("--split", help="how parts are cut from it [the preset's]")
    parser.add_argument("--part", default="val")
    parser.add_argument("--bytes", type=int, default=0, help="of the part, from its start; 0: all")
    parser.add_argument("--lanes", type=int, default=0, help="of compress; 0: its own choice")
    parser.add_argument("--steps", type=int, default=0, help="of training; 0: the preset's")
    parser.add_argument("--items", default=",".join(ITEMS))
    parser.add_argument(
        "--seconds", type=float, default=1800.0, help="for all items together; what is not done then is ended"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--groups", choices=sorted(GROUPS), help="what runs beside what [the device's]")
    parser.add_argument("--out", type=Path, default=Path("runs/score-study"))
    parser.add_argument("--item", help=argparse.SUPPRESS)
    parser.add_argument("--budget", help=argparse.SUPPRESS)
    options = parser.parse_args()
    config, device = PRESETS[options.preset](), device_called(options.device)
    changes: dict[str, Any] = {"data": options.data or config.train.data, "device": device.type}
    changes |= {"steps": options.steps} if options.steps else {}
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))
    names = options.items.split(",")
    if unknown := [name for name in names if name not in ITEMS]:
        parser.error(f"there is no item {unknown[0]!r}; choose of {', '.join(ITEMS)}")
    if options.model is not None:
        names = [name for name in names if name != "train"]
    options.groups = options.groups or device.type
    names = [name for name in names if any(name in chain for group in GROUPS[options.groups] for chain in group)]
    options.model = options.model or options.out / "model.tritwise"
    make_folder(options.out)
    if options.item:
        return int(run_chain(options, config, device) > 0)
    describe(config.train.data)  # unpacked once, before many want it
    run_groups(names, options)
    record = collect(options, config, device)
    return int(any(name not in record["items"] for name in names))


if __name__ == "__main__":
    sys.exit(main())
