"""Many short runs of the small Shakespeare model with one thing changed at a time, side by side on one GPU.

    python benchmarks/recipe_sweep.py SWEEP --out FILE.jsonl [--workers 16]

SWEEP names a list below. Every run sees the same batches for the same seed and is scored on the whole validation part,
chunked (stride = ctx) and sliding (stride = ctx / 2). One JSON line a run. This is how the recipe's settings were
chosen; the numbers are in docs/LOG.md. Small models are bound by kernel launches: on an NVIDIA GPU, start its
multi-process service first (nvidia-cuda-mps-control -d), which doubles the throughput.
"""

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch

from tritwise.data.sampler import Sampler
from tritwise.data.source import describe
from tritwise.data.split import split
from tritwise.models import ByteLM
from tritwise.optim import rate_factor
from tritwise.recipes import recipe
from tritwise.score import score
from tritwise.train import override
from tritwise.train.device import batch_on
from tritwise.train.optimizers import build_optimizers, set_rates
from tritwise.train.stepper import Stepper


def _variants(base: dict[str, Any], *changes: dict[str, Any]) -> list[dict[str, Any]]:
    return [base, *({**base, **change} for change in changes)]


SWEEPS: dict[str, list[dict[str, Any]]] = {
    "interval": _variants(
        {"steps": 1100},
        {"seed": 1},
        {"interval": 1},
        {"interval": 2},
        {"interval": 8},
        {"interval": 16},
        {"batch": 16, "steps": 2200},
        {"batch": 16, "steps": 2200, "interval": 8},
        {"depth": 2, "steps": 1550},
        {"depth": 2, "mlp_ratio": 4, "steps": 1300},
        {"mlp_ratio": 4, "steps": 900},
        {"width": 96, "steps": 1700},
        {"width": 96, "depth": 4, "steps": 1350},
        {"ngram_rows": 16384},
        {"rate": 0.02},
        {"ngrams": 1},
    ),
    "seeds": [{"seed": seed} for seed in range(5)],
}


def run(changes: dict[str, Any]) -> dict[str, Any]:
    """One training run; returns what was changed and both scores."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = override(recipe("shakespeare"), changes)
    settings = config.train
    parts = split(describe(settings.data).data, settings.split)
    sampler = Sampler(parts["train"], settings.batch, config.model.ctx, settings.seed)
    torch.manual_seed(settings.seed)
    model = ByteLM(config.model).to(device)
    optimizers = build_optimizers(model, settings)
    stepper = Stepper(model, optimizers, guard=True, seed=settings.seed)
    began, loss = time.perf_counter(), float("nan")
    for step in range(settings.steps):
        set_rates(optimizers, rate_factor(step, settings.steps, settings.warmup, settings.decay))
        loss = stepper.step_over([batch_on(device, sampler, step, 0)]).item()
    seconds = time.perf_counter() - began
    ctx = config.model.ctx
    return {
        "changes": changes,
        "chunked": round(score(model, parts["val"], stride=ctx, device=device).nats, 4),
        "sliding": round(score(model, parts["val"], stride=ctx // 2, device=device).nats, 4),
        "last_loss": round(loss, 3),
        "seconds": round(seconds),
        "config": config.as_dict(),
    }


def main() -> None:
    """Run a sweep with several processes and write its lines as they come."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweep", choices=sorted(SWEEPS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=16)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.workers, maxtasksperchild=1) as pool, options.out.open("w", encoding="utf-8") as out:
        for result in pool.imap_unordered(run, SWEEPS[options.sweep]):
            out.write(json.dumps(result) + "\n")
            out.flush()
            print(result["changes"], result["chunked"], result["sliding"], result["seconds"], flush=True)


if __name__ == "__main__":
    main()
