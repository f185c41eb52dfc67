"""Where the time of a training step goes on a GPU: the kernels of one contender, by the time they take.

    python benchmarks/step_profile.py SIZE[,SIZE…] --contenders ours,adamw-bf16 --out FOLDER [--steps 3] [--data TEXT]
    python benchmarks/step_profile.py BUDGET[,BUDGET…] --contenders recurrent-ternary:1,recurrent-ternary:3 --out FOLDER
        [--set fp8=true …]

For every size (a preset of `tritwise bench step`) and contender FOLDER/profile_SIZE_CONTENDER.json lists kernels by
name: calls a step, milliseconds a step, and the share. A size that is a number of bytes stands for the contestants of
`tritwise bench budget`, as `benchmarks/budget_study.py` trains them, at so many repeats of the core (all, unless told).
`step_ms` is the median time of a step that is not profiled, `busy_ms` the sum of the kernels, `wall_ms` the time a step
takes while it is profiled. `idle_ms` is the time of a step in which no kernel ran, on whatever stream, between the
first of all and the last: `waits` lists after and before which kernels most of it was, and `gaps` the longest single
ones, with the time since the first kernel.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from budget_study import Study
from torch.profiler import ProfilerActivity, profile

from tritwise.bench.runner import Batches, Runner, entries_called
from tritwise.bench.sizes import Size, size_called
from tritwise.cli.commands import settings_given
from tritwise.files import write_json
from tritwise.train import override
from tritwise.train.device import build_model, round_products, speed_of, wait_for
from tritwise.train.loop import stepper_of
from tritwise.train.optimizers import build_optimizers
from tritwise.train.run import surroundings

LONGEST = 120  # letters of a kernel's name
SETTLE, TIMED = 3, 5  # steps before any is timed; rounds of steps that are timed unprofiled
WAITS = 12  # that are listed, the longest; of gaps as many


class Gap(NamedTuple):
    """Microseconds without a kernel, from when on, and the kernels that ended and began it."""

    length: float
    start: float
    after: str
    before: str


def gaps_of(spans: Iterable[tuple[float, float, str]]) -> list[Gap]:
    """All gaps between kernels, in order. spans: when each began and ended, of any streams and in any order, and its
    name. Kernels may overlap, or lie within another."""
    gaps: list[Gap] = []
    end, last = None, ""
    for start, stop, name in sorted(spans):
        if end is not None and start > end:
            gaps.append(Gap(start - end, end, last, name))
        if end is None or stop > end:
            end, last = stop, name
    return gaps


def contender(size_name: str, name: str, device: torch.device, data: str) -> tuple[Callable[[], Any], str]:
    """A step of one contender of `bench step`, and the mode in which it runs."""
    size, entry = size_called(size_name), entries_called([name])[name]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Runner(entry, size, Batches(size, device, data), device, dtype).step, size.mode


def contestant(
    budget: int, told: str, device: torch.device, data: str, sets: dict[str, Any]
) -> tuple[Callable[[], Any], str]:
    """A step of one contestant of `bench budget`, NAME or NAME:REPEATS, and how it is compiled."""
    name, _, repeats = told.partition(":")
    study = Study(data, Path(), tiny=device.type == "cpu")
    config = override(study.cell(name, budget, 400.0), sets)
    torch.manual_seed(config.train.seed)
    model = build_model(config, device)
    if config.train.fp8:
        round_products(model)
    optimizers = build_optimizers(model, config.train)
    stepper = stepper_of(config, model, optimizers, speed_of(config.train.compile, model))
    batches = Batches(Size(name, config.model, config.train.batch), device, data, config.train.seed)
    loops = int(repeats or 0) % config.model.loops
    if stepper.records_whole_steps:
        stepper.record(batches[0][0], loops)
    return lambda: stepper.step_over(batches[stepper.taken], loops), config.train.compile


def profiled(step: Callable[[], Any], device: torch.device, steps: int) -> dict[str, Any]:
    """The kernels of `steps` steps, after those that settle and those that are timed."""
    cuda = device.type == "cuda"
    for _ in range(SETTLE):
        step()
    times = []
    for _ in range(TIMED):
        wait_for(device)
        began = time.perf_counter()
        for _ in range(steps):
            step()
        wait_for(device)
        times.append((time.perf_counter() - began) / steps)
    kinds = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=kinds) as seen:
        began = time.perf_counter()
        for _ in range(steps):
            step()
        wait_for(device)
        wall = time.perf_counter() - began
    kernels: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    # An annotation of the host, seen by the device, would cover the gaps within it.
    events = [
        event
        for event in seen.events() or []
        if (event.device_type.name == "CUDA") == cuda and not (cuda and event.is_user_annotation)
    ]
    for event in events:
        kernel = kernels[event.name[:LONGEST]]
        kernel[0] += 1
        kernel[1] += event.device_time if cuda else event.self_cpu_time_total
    gaps = gaps_of((event.time_range.start, event.time_range.end, event.name[:LONGEST]) for event in events)
    began_us = min((event.time_range.start for event in events), default=0.0)
    waits: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for gap in gaps:
        wait = waits[gap.after, gap.before]
        wait[0] += 1
        wait[1] += gap.length
    busy = sum(microseconds for _, microseconds in kernels.values())
    ordered = sorted(kernels.items(), key=lambda item: -item[1][1])
    lines = [
        {"kernel": kernel, "calls": calls / steps, "ms": us / 1000 / steps, "share": us / busy}
        for kernel, (calls, us) in ordered
    ]
    longest = sorted(waits.items(), key=lambda item: -item[1][1])[:WAITS]
    return {
        "steps": steps,
        "step_ms": 1000 * statistics.median(times),
        "wall_ms": 1000 * wall / steps,
        "busy_ms": busy / 1000 / steps,
        "idle_ms": sum(gap.length for gap in gaps) / 1000 / steps,
        "kernels": lines,
        "waits": [
            {"after": after, "before": before, "times": times / steps, "ms": us / 1000 / steps}
            for (after, before), (times, us) in longest
        ],
        "gaps": [
            {
                "ms": gap.length / 1000,
                "at_ms": (gap.start - began_us) / 1000,
                "after": gap.after,
                "before": gap.before,
            }
            for gap in sorted(gaps, reverse=True)[:WAITS]
        ],
        **surroundings(device),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sizes")
    parser.add_argument("--contenders", default="ours")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--data", default="shakespeare")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of a contestant")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    options.out.mkdir(parents=True, exist_ok=True)
    for size in options.sizes.split(","):
        for name in options.contenders.split(","):
            if size.isdecimal():
                sets = settings_given(options.set)
                step, mode = contestant(int(size), name, device, options.data, sets)
            else:
                step, mode = contender(size, name, device, options.data)
            told = {"bench": "profile", "size": size, "contender": name, "mode": mode, "set": options.set}
            found = told | profiled(step, device, options.steps)
            del step
            file = "_".join(("profile", size, name.replace(":", "-"), *(one.replace("=", "-") for one in options.set)))
            write_json(options.out / f"{file}.json", found)
            print(
                f"{file}: {found['step_ms']:.2f} ms a step, {found['busy_ms']:.2f} ms of kernels,"
                f" {found['idle_ms']:.3f} ms without any"
            )
            for line in found["kernels"][:25]:
                print(f"{line['ms']:9.3f} ms {line['calls']:7.1f} x  {line['kernel']}")
            for wait in found["waits"]:
                print(
                    f"waited {wait['ms']:9.3f} ms {wait['times']:7.1f} x  {wait['after'][:50]} | {wait['before'][:50]}"
                )
            for gap in found["gaps"]:
                print(f"gap {gap['ms']:9.4f} ms at {gap['at_ms']:9.3f}: {gap['after'][:50]} | {gap['before'][:50]}")


if __name__ == "__main__":
    main()
