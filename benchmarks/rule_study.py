"""The runs behind docs/RULE.md: update rules, scaling, robustness and two published set-ups, on one GPU or several.

    python benchmarks/rule_study.py STAGE[,STAGE…] --data ENWIK8 --out FOLDER [--workers N]

Every stage is a list of cells of `tritwise.bench`, in order of importance: a cell that FOLDER/rows.jsonl already holds
is not run again, so a study can be cut off and taken up. The rows go to benchmarks/results/rules_GPU_DATE.jsonl.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console

from tritwise.bench.grid import GRID, grid_cells
from tritwise.bench.harness import Cell
from tritwise.bench.runner import TURNS
from tritwise.bench.sweep import SweepLines, devices_called, run_cells
from tritwise.ops.backends import ENVIRONMENT

SPLIT = "first:38000000,last:2000000"
STEADY = {"row_memory": 0.95}
"""Rows that are steadied, as `tritwise train` has them."""


def full(data: str) -> Cell:
    """The 19.1M-weight byte model on enwik8, 3600 steps of 64 x 512 bytes. Ours wants a rate that falls all the way."""
    return Cell(
        rule="ours",
        rate=0.03,
        data=data,
        split=SPLIT,
        width=512,
        depth=6,
        ctx=512,
        batch=64,
        shape={"column_scales": True},
        steps=3600,
        warmup=100,
        decay=1.0,
        dtype="bfloat16",
    )


def grid(base: Cell, rule: str, rates: list[float], *, seeds: int = 1, **changes: Any) -> list[Cell]:
    """`base` with another rule at each rate and seed. Rules other than ours want a rate that falls over the last half,
    and have no scales of columns: a float matrix holds them already."""
    own = {} if rule == "ours" else {"decay": 0.5, "shape": {}}
    return [replace(base, rule=rule, rate=rate, seed=seed, **own | changes) for seed in range(seeds) for rate in rates]


def main_cells(data: str) -> list[Cell]:
    """The comparison: every float rival and the one-byte variant tuned, with more seeds of the two that are nearest."""
    base = full(data)
    return [
        *grid(base, "ours", [0.03], seeds=3),
        *grid(base, "adamw", [0.002, 0.003, 0.004, 0.0015]),
        *grid(base, "bitnet-adamw", [0.002]),
        *grid(base, "bitnet-muon", [0.02]),
        *grid(base, "muon", [0.02]),
        *grid(base, "adamw", [0.003], seeds=3),
        *grid(base, "bitnet-adamw", [0.004]),
        *grid(base, "bitnet-muon", [0.01, 0.04]),
        *grid(base, "muon", [0.01]),
        *grid(base, "bitnet-adamw", [0.008]),
        *grid(base, "bitnet-muon", [0.08]),
        *grid(base, "adamw", [0.003], settings={"weight_decay": 0.1}),
    ]


def short_cells(data: str) -> list[Cell]:
    """The other rules, at a third of the length."""
    base = replace(full(data), steps=1200)
    return [
        *grid(base, "ours", [0.03]),
        *grid(base, "adamw", [0.003]),
        *(cell for threshold in (3, 8, 32) for cell in grid(base, f"sign-counter-{threshold}", [1.0])),
        *grid(base, "random-trits", [0.002, 0.004, 0.008]),
        *grid(base, "dqt", [0.003, 0.01, 0.03, 0.1]),
        *grid(base, "bop", [0.001, 0.003, 0.01, 0.03]),
        *grid(base, "signsgd", [0.0001, 0.0002, 0.0005]),
        *grid(base, "lion", [0.0002, 0.0004, 0.0008]),
        *grid(base, "lion-bf16", [0.0002, 0.0004, 0.0008]),
        *grid(base, "adamw-bf16", [0.001, 0.002, 0.004]),
    ]


def probe_cells(data: str) -> list[Cell]:
    """One setting of ours changed at a time, at a third of the length: the ablation."""
    base = replace(full(data), steps=1200)

    def ours(**settings: Any) -> Cell:
        return replace(base, settings=settings)

    return [
        base,
        replace(base, shape={}),
        replace(base, rate=0.045),
        replace(base, rate=0.02),
        replace(base, decay=0.5),
        ours(scale_rate=0.0),
        ours(scale_rate=0.01),
        ours(head_rate=1.0),
        ours(embedding_rate=1.0),
        ours(direction="newton_schulz"),
        ours(direction="row_column"),
        ours(direction="sign"),
        ours(direction="rms"),
        ours(momentum=0.95),
        ours(momentum=0.0),
        ours(steps=2),
        ours(steps=5),
        ours(interval=4),
        ours(compact=True),
        replace(base, seed=1),
        replace(base, seed=2),
    ]


def scaling_cells(data: str) -> list[Cell]:
    """Ours with steadied rows against AdamW at three sizes and two lengths. AdamW's other rates at the greater length
    come last, and not at the largest size."""
    cells, others = [], []
    for width, depth, rates in ((1024, 7, (0.001, 0.002, 0.0005)), (256, 6, (0.004, 0.008)), (512, 6, (0.003, 0.002))):
        base = replace(full(data), width=width, depth=depth, settings=STEADY)
        short = replace(base, steps=1200)
        cells += [base, *grid(base, "adamw", [rates[0]], settings={})]
        cells += [short, *grid(short, "adamw", list(rates), settings={})]
        others += grid(base, "adamw", list(rates[1:]), settings={}) if width < 1024 else []
    return cells + others


def robust_cells(data: str) -> list[Cell]:
    """The default rate and its neighbours over a range of 4 in batch and in width, at a third of the length."""
    base, cells = replace(full(data), steps=1200, settings=STEADY), []
    for rate in (0.03, 0.02, 0.045):
        cells += [replace(base, batch=batch, rate=rate) for batch in (32, 64, 128)]
        cells += [replace(base, width=width, rate=rate) for width in (256, 1024)]
    return cells


def memory_cells(data: str) -> list[Cell]:
    """Rows that are steadied (`row_memory`), and the one-byte variant's own settings, at a third of the length."""
    base, steady = replace(full(data), steps=1200), STEADY
    compact = replace(base, settings={"compact": True})
    return [
        replace(base, settings=steady),
        compact,
        replace(compact, settings={"compact": True} | steady),
        replace(base, settings=steady, seed=1),
        replace(base, seed=1),
        replace(compact, rate=0.02),
        replace(base, settings={"row_memory": 0.9}),
        replace(base, settings={"row_memory": 0.98}),
        replace(compact, settings={"compact": True, "momentum": 0.85}),
        replace(base, settings=steady | {"momentum": 0.85}),
        replace(compact, settings={"compact": True, "momentum": 0.95}),
        replace(base, settings=steady, rate=0.04),
        replace(compact, shape=base.shape | {"group": 1 << 16}),
        replace(compact, rate=0.045),
        replace(base, settings=steady, seed=2),
        replace(base, seed=2),
        replace(compact, decay=0.7),
    ]


def steady_cells(data: str) -> list[Cell]:
    """The comparison's own rows with steadied rows."""
    base = full(data)
    return [
        *grid(base, "ours", [0.03], settings=STEADY, seeds=3),
        *grid(base, "ours", [0.03], settings={"compact": True} | STEADY, seeds=3),
        *grid(base, "ours", [0.045], settings={"compact": True} | STEADY),
    ]


def regular_cells(data: str) -> list[Cell]:
    """What keeps a model from overfitting a text that it reads three times: dropout, weight decay, and other rates of
    ours at the full length."""
    base = replace(full(data), settings=STEADY)

    def dropping(share: float) -> dict[str, Any]:
        return {"dropout": share}

    return [
        *grid(base, "ours", [0.02, 0.04]),
        *(replace(base, shape=base.shape | dropping(share)) for share in (0.05, 0.1)),
        *grid(base, "adamw", [0.003], seeds=3, settings={"weight_decay": 0.1}),
        *(cell for share in (0.05, 0.1) for cell in grid(base, "adamw", [0.003], settings={}, shape=dropping(share))),
        *grid(base, "adamw", [0.003], settings={"weight_decay": 0.3}),
    ]


def fp8_cells(data: str) -> list[Cell]:
    """Products in float8, which want one scale a row, against the same model in bfloat16."""
    base = replace(full(data), settings=STEADY)
    base = replace(base, shape=base.shape | {"group": 1 << 16})
    return [replace(base, seed=seed, settings=STEADY | own) for seed in range(3) for own in ({"fp8": True}, {})]


def group_cells(data: str) -> list[Cell]:
    """Fewer weights to a scale than 256: is what they cost worth it?"""
    base = replace(full(data), settings=STEADY)

    def grouped(group: int, **changes: Any) -> Cell:
        return replace(base, shape=base.shape | {"group": group}, **changes)

    return [
        *(grouped(128, seed=seed) for seed in range(3)),
        grouped(64),
        *(grouped(group, steps=1200) for group in (128, 64, 32)),
        *(grouped(64, seed=seed) for seed in (1, 2)),
    ]


def warm_cells(data: str) -> list[Cell]:
    """A longer rise of the rate at the start: 100 steps are the default. 300 gained .004 in the laboratory (1200 steps,
    two seeds), and 20 lost .009."""
    base = replace(full(data), settings=STEADY, warmup=300)
    finer = replace(base, shape=base.shape | {"group": 128})
    return [
        *(replace(finer, seed=seed) for seed in range(3)),
        *grid(base, "adamw", [0.003], settings={"weight_decay": 0.1}),
        replace(base, seed=0),
        replace(finer, warmup=600),
        *(replace(base, seed=seed) for seed in (1, 2)),
    ]


def reference_cells(data: str) -> list[Cell]:
    """The comparison's first row once more by plain torch, eager: what kernels, recorded steps and compilers make of
    it has to be the same within what seeds differ by. A step takes some 150 ms: a third of the length comes first."""
    base = replace(full(data), settings=STEADY, bench="reference")
    return [replace(base, steps=1200), base]


def nesterov_cells(data: str) -> list[Cell]:
    """Directions that count the newest gradient once more."""
    base = replace(full(data), settings=STEADY | {"nesterov": True})
    finer = replace(base, shape=base.shape | {"group": 128})
    slow = replace(finer, settings=finer.settings | {"momentum": 0.93})
    return [
        *(replace(finer, seed=seed) for seed in range(3)),
        slow,
        replace(finer, settings=finer.settings | {"momentum": 0.95}),
        *(replace(base, seed=seed) for seed in range(3)),
        replace(finer, rate=0.025),
        *(replace(slow, seed=seed) for seed in (1, 2)),
        replace(slow, rate=0.025),
    ]


def turn_cells(data: str) -> list[Cell]:
    """Matrices that take turns at moving, at every 2nd to 8th step: cheaper, and how much worse?"""
    base = replace(full(data), settings=STEADY)

    def turns(interval: int, **changes: Any) -> Cell:
        return replace(base, settings=STEADY | TURNS | {"interval": interval}, **changes)

    return [
        *(turns(4, seed=seed) for seed in range(3)),
        *(turns(interval, steps=1200) for interval in (4, 2, 8)),
        *(turns(2, seed=seed) for seed in range(3)),
    ]


def byte_cells(data: str) -> list[Cell]:
    """What one byte a weight could be, at a third of the length: no momentum, a short one, tables of two bytes."""
    base = replace(full(data), steps=1200)

    def ours(rate: float = 0.03, **settings: Any) -> Cell:
        return replace(base, rate=rate, settings=STEADY | settings)

    tables = {"embedding_compact": False, "head_compact": False}
    return [
        ours(momentum=0.0),
        ours(compact=True, **tables),
        ours(compact=True, steps=2),
        ours(momentum=0.0, rate=0.02),
        ours(momentum=0.5),
        ours(momentum=0.0, direction="newton_schulz"),
        ours(compact=True, steps=5),
        ours(compact=True, scale_rate=0.01),
    ]


def nanogpt_cells(data: str) -> list[Cell]:
    """nanoGPT's GPU recipe on tinyshakespeare: 10.8M weights, context 256, batch 64, at most 5000 steps."""
    base = replace(full("shakespeare"), settings=STEADY, split="90/10", bench="nanogpt", eval_interval=500)
    base = replace(base, width=384, depth=6, ctx=256, stride=128)

    def dropping(share: float, steps: int, **changes: Any) -> Cell:
        return replace(base, steps=steps, **{"shape": base.shape | {"dropout": share}} | changes)

    return [
        dropping(0.2, 1000),
        dropping(0.35, 2000),
        dropping(0.35, 1000),
        dropping(0.5, 2000),
        dropping(0.5, 3000),
        dropping(0.5, 2000, seed=1),
        dropping(0.5, 2000, seed=2),
        dropping(0.2, 2000),
        dropping(0.35, 1000, seed=1),
        dropping(0.35, 1000, rate=0.015),
        replace(base, steps=500, eval_interval=0),
        *grid(dropping(0.2, 1000), "adamw", [0.001, 0.002], settings={}, shape={"dropout": 0.2}),
    ]


def optimizer_cells(data: str) -> list[Cell]:
    """The published optimizer grid, on both texts."""
    base = replace(GRID, dtype="bfloat16")
    return [*grid_cells(base), *grid_cells(replace(base, data=data))]


def small_cells(data: str) -> list[Cell]:
    """Settings of ours at the size and on the text of the optimizer grid."""
    base = replace(GRID, dtype="bfloat16", decay=1.0)
    columns = GRID.shape | {"column_scales": True}
    return [
        *(replace(base, rate=rate) for rate in (0.015, 0.03, 0.06)),
        *(replace(base, rate=rate, shape=columns) for rate in (0.015, 0.03)),
        *(replace(base, rate=0.03, settings={"momentum": momentum}) for momentum in (0.8, 0.95)),
        *(replace(base, rate=0.03, settings={"scale_rate": rate}) for rate in (0.0, 0.01)),
        replace(base, rate=0.03, settings={"embedding_rate": 4.0}),
        replace(base, rate=0.03, settings={"head_rate": 1.0}),
    ]


STAGES: dict[str, Callable[[str], list[Cell]]] = {
    "main": main_cells,
    "short": short_cells,
    "probe": probe_cells,
    "scaling": scaling_cells,
    "robust": robust_cells,
    "nanogpt": nanogpt_cells,
    "optimizers": optimizer_cells,
    "small": small_cells,
    "memory": memory_cells,
    "steady": steady_cells,
    "byte": byte_cells,
    "regular": regular_cells,
    "fp8": fp8_cells,
    "turns": turn_cells,
    "groups": group_cells,
    "warm": warm_cells,
    "nesterov": nesterov_cells,
    "reference": reference_cells,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("stages", help=f"one or more of {', '.join(STAGES)}, separated by commas")
    parser.add_argument("--data", required=True, help="enwik8, plain or compressed")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=1, help="processes a device: 4 for small models")
    options = parser.parse_args()
    devices = devices_called(options.device)
    for stage in options.stages.split(","):
        plain = stage == "reference"
        with patch.dict(os.environ, {ENVIRONMENT: "reference"} if plain else {}):
            run_cells(
                STAGES[stage](options.data),
                options.out / "rows.jsonl",
                devices,
                workers=options.workers,
                compile=devices != ["cpu"] and not plain,
                display=SweepLines(Console()),
            )


if __name__ == "__main__":
    main()
