"""Where the time of a training step goes on a GPU: the kernels of one contender, by the time they take.

    python benchmarks/step_profile.py SIZE[,SIZE…] --contenders ours,adamw-bf16 --out FOLDER [--steps 3] [--data TEXT]

For every size (a preset of `tritwise bench step`) and contender FOLDER/profile_SIZE_CONTENDER.json lists kernels by
name: calls a step, milliseconds a step, and the share. `busy_ms` is their sum, `wall_ms` the time a step takes while it
is profiled. `idle_ms` is the time of a step in which no kernel ran, on whatever stream, between the first of all and
the last: `waits` lists after and before which kernels most of it was, and `gaps` the longest single ones, with the time
since the first kernel.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from tritwise.bench.runner import Batches, Runner, entries_called
from tritwise.bench.sizes import size_called
from tritwise.files import write_json
from tritwise.train.run import surroundings

LONGEST = 120  # letters of a kernel's name
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


def profiled(size_name: str, name: str, device: torch.device, steps: int, data: str) -> dict[str, Any]:
    """The kernels of `steps` steps, after three that count for nothing."""
    size, entry = size_called(size_name), entries_called([name])[name]
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    runner = Runner(entry, size, Batches(size, device, data), device, dtype)
    for _ in range(3):
        runner.step()
    if cuda:
        torch.cuda.synchronize(device)
    kinds = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=kinds) as seen:
        began = time.perf_counter()
        for _ in range(steps):
            runner.step()
        if cuda:
            torch.cuda.synchronize(device)
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
    told = {"bench": "profile", "size": size_name, "contender": name, "mode": size.mode, "steps": steps}
    return told | {
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
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    options.out.mkdir(parents=True, exist_ok=True)
    for size in options.sizes.split(","):
        for name in options.contenders.split(","):
            found = profiled(size, name, device, options.steps, options.data)
            write_json(options.out / f"profile_{size}_{name}.json", found)
            print(
                f"{size} {name}: {found['wall_ms']:.2f} ms a step, {found['busy_ms']:.2f} ms of kernels,"
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
