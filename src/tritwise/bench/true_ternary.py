"""The 14M-weight comparison: ternary weights against Adam and SignSGD in float, on the same batches, 200 short steps.

    true-ternary   the product's rule: registers and int8 momentum
    sign-counter   trits, and an int8 count of gradient signs that is thrown away at a flip (the older rule)
    adam-fp32      the same shape in float, properly started (std 1/sqrt(fan-in)), Adam without weight decay
    signsgd        the same float model, weight -= rate * sign(gradient): no optimizer state, but a float weight

Every row has the same shape, batches, schedule and scorer, and a rate that was tuned for it (contenders.py). A loss
above ln 288 = 5.663 nats is worse than a uniform guess over the 288 symbols, so that line, unigram and bigram stand
beside the rows.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tritwise.bench.contenders import CONTENDERS, SCALE_RATE, Bench, Task
from tritwise.bench.memory import measure_state
from tritwise.bench.sweep import devices_called
from tritwise.bench.true_ternary_tables import show_result
from tritwise.data.sampler import Sampler
from tritwise.data.source import describe
from tritwise.data.split import named_part
from tritwise.data.split import split as split_data
from tritwise.errors import UserError
from tritwise.files import finite, make_folder, read_json, write_json
from tritwise.ops import backend
from tritwise.train.run import surroundings

BACKEND_ALIASES = {"gpu": "triton", "dense-fallback": "reference"}


def run(
    configs: Sequence[str] = ("true-ternary", "adam-fp32", "signsgd"),
    steps: int = 200,
    batch: int = 4,
    ctx: int = 33,
    update_backend: str = "auto",
    scale_update_interval: int = 0,
    accum_threshold: int = 32,
    print_every: int = 20,
    reuse_base: Path | str | None = None,
    out: Path | str | None = None,
    seed: int = 0,
    device: str = "auto",
    data: str = "shakespeare",
    split: str = "90/10",
    width: int = 384,
    depth: int = 8,
    val_bytes: int = 32768,
    rates: Mapping[str, Sequence[float]] | None = None,
    measure_3b: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train every configuration, print the comparison on `console`, write it to `out`; returns it as plain JSON.

    configs         which of CONTENDERS, in this order
    steps, batch, ctx   optimizer steps, sequences a step, bytes a sequence
    update_backend  which implementation of the ternary operations runs: auto, or one that `tritwise.ops` knows
                    (reference, cpu, triton); gpu means triton and dense-fallback means reference. none: nothing is
                    ever updated, in any configuration, so forward and backward are measured alone and the loss stays
                    where it starts
    scale_update_interval   true-ternary's scales learn at every n-th turn of their matrix; 0: they stay
    accum_threshold sign-counter: how many votes of gradient signs one flip of a trit takes, 1 … 127
    print_every     steps between printed losses, each the mean since the last one
    reuse_base      an earlier `out`: the rows of its float configurations are taken from it and not run again
    out             the JSON file to write; None: none
    width, depth    shape of the model; 384 x 8 has 14,376,960 weights
    val_bytes       bytes of val, from its start, that are scored after the last step in windows of ctx; 0: all
    rates           configuration -> rates to try: the row is the one with the best val loss, and lists what was tried.
                    Without, the rate in CONTENDERS, which was tuned for the default settings
    measure_3b      build the state of a model of three billion weights too, and measure it: 9 GB of memory, a minute

    Raises UserError for a setting that cannot work, and for a `reuse_base` made with other settings, naming the first.
    """
    names = _check_names(configs, rates or {})
    for name, value, least in (
        ("print_every", print_every, 1),
        ("scale_update_interval", scale_update_interval, 0),
        ("steps", steps, 1),
        ("val_bytes", val_bytes, 0),
    ):
        if value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}")
    place = torch.device(devices_called(device)[0])
    source, told = describe(data), surroundings(place)
    task = Task(
        steps=steps,
        batch=batch,
        ctx=ctx,
        width=width,
        depth=depth,
        data=source.name,
        digest=source.digest[:16],
        split=split,
        val_bytes=val_bytes,
        seed=seed,
        updates=update_backend != "none",
        device=told["cpu"] if place.type == "cpu" else told["device"],
        torch=told["torch"],
    )
    parts = split_data(source.data, split)
    scale_rate = SCALE_RATE if scale_update_interval else 0.0
    bench = Bench(
        task,
        place,
        Sampler(named_part(parts, "train"), batch, ctx, seed),
        parts["val"][: val_bytes or None],
        {"true-ternary": {"scale_rate": scale_rate}, "sign-counter": {"threshold": accum_threshold}},
        scale_update_interval,
        update_backend,
        print_every,
        console,
    )
    wanted = {name: list((rates or {}).get(name, [CONTENDERS[name].rate])) for name in names}
    reused = _reusable(Path(reuse_base), task, wanted) if reuse_base is not None else {}
    if out is not None:
        make_folder(Path(out).parent)  # refused now, not after minutes of work
    asked = BACKEND_ALIASES.get(update_backend, update_backend)
    with nullcontext() if asked in ("auto", "none") else backend(asked):
        bench.warm_up([name for name in names if name not in reused])
        rows = [reused[name] if name in reused else bench.best_of(name, wanted[name]) for name in names]
        measured = measure_state(place, seed=seed) if measure_3b else None
    result = finite(
        {
            "bench": "true-ternary",
            "settings": asdict(task) | {"configs": names, "print_every": print_every},
            "rows": rows,
            "ladder": {"bench": "ladder", "data": source.name, "split": split, "rows": bench.ladder(parts["train"])},
            "projected_3b": {row["rule"]: round(3e9 * row["bytes_per_weight"]) for row in rows},
            "measured_3b": measured,
        }
    )
    if out is not None:
        write_json(out, result)
    if console is not None:
        show_result(console, result)
    return result


def _check_names(configs: Sequence[str], rates: Mapping[str, Sequence[float]]) -> list[str]:
    """The configurations, each once, in order. Raises UserError for unknown ones and for rates that cannot work."""
    names = list(dict.fromkeys(configs))
    if not names:
        raise UserError(f"no configuration is named; choose of {', '.join(CONTENDERS)}")
    for name in (*names, *rates):
        if name not in CONTENDERS:
            near = difflib.get_close_matches(name, CONTENDERS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose of {', '.join(CONTENDERS)}"
            raise UserError(f"there is no configuration {name!r}; {hint}")
    for name, values in rates.items():
        if not values or not all(math.isfinite(rate) and rate > 0 for rate in values):
            raise UserError(f"the rates of {name} are {list(values)}; give finite numbers above 0")
    return names


def _reusable(path: Path, task: Task, wanted: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """The rows of float configurations in an earlier result, where they are the rows that this run would make.

    Raises UserError, naming the first difference, where they are not, or if the file is no such result.
    """
    told = read_json(path)
    if not isinstance(told, dict) or told.get("bench") != "true-ternary" or "rows" not in told:
        raise UserError(f"{path} is no result of the true-ternary benchmark; name a file written with --out")
    before = told["settings"]
    for key, now in asdict(task).items():
        if before.get(key) != now:
            raise UserError(
                f"{path} was made with {key} {before.get(key)}, this run has {now}; "
                "make them equal or leave out --reuse-base"
            )
    rows = {row["rule"]: row | {"reused": True} for row in told["rows"] if not CONTENDERS[row["rule"]].ternary}
    for name in rows.keys() & wanted.keys():
        tried = [rate for rate, _ in rows[name]["rates_tried"]]
        if tried != wanted[name]:
            raise UserError(f"{path} tried rates {tried} for {name}, this run {wanted[name]}; leave out --reuse-base")
    return rows
