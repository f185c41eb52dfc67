"""Time per training step against width and batch: ternary by the register rule, float by AdamW, the same model.

    python benchmarks/step_cost.py [--out FILE.json] [--plot FILE.png] [--widths 64,128] [--batches 8,32] [--rounds 9]

Both models take steps in turn in one process, so that what disturbs the machine disturbs both; the figures are medians
over rounds and the ratio is the median of the ratios round by round. Exit code 1 if any ratio is above --limit.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tritwise.data.sampler import Sampler
from tritwise.data.source import describe
from tritwise.data.split import split
from tritwise.files import write_json
from tritwise.models import ByteLM, ModelConfig
from tritwise.report.plots import save_png, step_cost_figure
from tritwise.train.config import Config, TrainConfig
from tritwise.train.optimizers import build_optimizers
from tritwise.train.run import manifest
from tritwise.train.stepper import Stepper


class Runner:
    """One model and its optimizer, taking real steps on the bundled text."""

    def __init__(self, width: int, batch: int, ctx: int, depth: int, weights: str) -> None:
        torch.manual_seed(0)
        optimizer = "trit" if weights == "trit" else "adamw"
        rate = 0.015 if weights == "trit" else 1e-3
        settings = TrainConfig(batch=batch, optimizer=optimizer, rate=rate)
        self.model = ByteLM(ModelConfig(width=width, depth=depth, ctx=ctx, weights=weights))
        self.optimizers = build_optimizers(self.model, settings)
        self.stepper = Stepper(self.model, self.optimizers, guard=True)
        self.sampler = Sampler(split(describe("shakespeare").data, "90/10")["train"], batch, ctx, 0)
        self.step = 0

    def seconds(self, steps: int) -> float:
        """Mean seconds per step over `steps` steps; a multiple of the interval, so that every matrix moved as often."""
        began = time.perf_counter()
        for _ in range(steps):
            self.stepper.step(*self.sampler.batch_at(self.step)).item()  # training reads the loss now and then
            self.step += 1
        return (time.perf_counter() - began) / steps


def measure(width: int, batch: int, ctx: int, depth: int, rounds: int) -> dict[str, Any]:
    """One point: medians in milliseconds and the ratio."""
    runners = {name: Runner(width, batch, ctx, depth, name) for name in ("trit", "float")}
    interval = runners["trit"].optimizers[0].param_groups[1]["interval"]
    for runner in runners.values():
        runner.seconds(interval)
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, runner in runners.items():
            times[name].append(runner.seconds(interval) * 1e3)
    return {
        "width": width,
        "batch": batch,
        "ctx": ctx,
        "depth": depth,
        "interval": interval,
        "weights": sum(p.numel() for p in runners["float"].model.parameters()),
        "tritwise_ms": statistics.median(times["trit"]),
        "adamw_ms": statistics.median(times["float"]),
        "ratio": statistics.median(a / b for a, b in zip(times["trit"], times["float"], strict=True)),
        "rounds": rounds,
    }


def main() -> int:
    """Measure the grid, print a table, write JSON and plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--widths", default="64,128,192,256,384")
    parser.add_argument("--batches", default="8,16,32,64")
    parser.add_argument("--ctx", type=int, default=64)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--limit", type=float, default=1.5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    rows = []
    for width in map(int, options.widths.split(",")):
        for batch in map(int, options.batches.split(",")):
            row = measure(width, batch, options.ctx, options.depth, options.rounds)
            rows.append(row)
            print(
                f"width {width:4d} batch {batch:3d} interval {row['interval']}: ternary {row['tritwise_ms']:7.1f} ms, "
                f"AdamW {row['adamw_ms']:7.1f} ms, ratio {row['ratio']:.2f}",
                flush=True,
            )
    worst = max(row["ratio"] for row in rows)
    print(f"worst ratio {worst:.2f}, limit {options.limit}")
    if options.out:
        about = manifest(Config(), torch.device("cpu"))
        write_json(options.out, {"manifest": about, "rows": rows, "worst_ratio": worst})
    if options.plot:
        save_png(step_cost_figure(rows), options.plot)
    return int(worst > options.limit)


if __name__ == "__main__":
    sys.exit(main())
