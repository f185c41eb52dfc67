"""The configurations of the 14M-weight comparison, what they have in common, and how one is trained and measured."""

import math
import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console

from tritwise.bench.flips import HORIZON, FlipWatch, saturated_share, zero_share
from tritwise.bench.memory import resident_bytes, restart_peak
from tritwise.bench.phases import PhaseTimer
from tritwise.bench.rules import rule_called
from tritwise.bench.true_ternary_tables import show_loss
from tritwise.data.sampler import Sampler
from tritwise.models import ByteLM, ModelConfig
from tritwise.ops import backend_table
from tritwise.optim import rate_factor
from tritwise.score import score_unless_diverged
from tritwise.score.ladder import NGram, count_ngrams
from tritwise.train.audit import audit, peak_bytes
from tritwise.train.optimizers import set_rates
from tritwise.train.run import surroundings

VOCAB = 288  # 256 bytes and 32 special symbols, which a text does not use
WARMUP = 20
SCALE_RATE = 0.003  # octaves a step; faster ones did harm (docs/LOG.md)


class Contender(NamedTuple):
    """A configuration: the rule behind it (bench/rules.py), its settings other than the default, and its tuned rate."""

    rule: str
    rate: float
    settings: dict[str, Any]
    ternary: bool


CONTENDERS = {
    "true-ternary": Contender("ours", 0.005, {"momentum": 0.9, "interval": 4}, True),
    "adam-fp32": Contender("adamw", 2e-3, {}, False),
    "signsgd": Contender("signsgd", 4e-4, {}, False),
    "sign-counter": Contender("sign-counter-3", 1.0, {}, True),
}


@dataclass(frozen=True)
class Task:
    """What all rows of a table must have in common. `updates`: False where nothing is ever updated."""

    steps: int
    batch: int
    ctx: int
    width: int
    depth: int
    data: str
    digest: str
    split: str
    val_bytes: int
    seed: int
    updates: bool
    device: str
    torch: str


@dataclass
class Bench:
    """Trains one configuration at a time. `settings`: configuration -> settings beyond those of its contender."""

    task: Task
    device: torch.device
    sampler: Sampler
    val: np.ndarray
    settings: dict[str, dict[str, Any]]
    scale_interval: int
    backend_name: str
    print_every: int
    console: Console | None

    def ladder(self, train: np.ndarray) -> list[dict[str, Any]]:
        """Chance, and what counting one and two bytes reaches on the bytes of val that the rows are scored on."""
        model = NGram(count_ngrams(train, 2))
        rungs = [(f"uniform-{VOCAB}", math.log(VOCAB)), ("uniform-256", math.log(256))]
        rungs += [("unigram", model.nats(self.val, 1)), ("bigram", model.nats(self.val, 2))]
        return [{"name": name, "nats": nats, "bpb": nats / math.log(2)} for name, nats in rungs]

    def warm_up(self, names: list[str]) -> None:
        """Two steps of very small models, so that no row pays for what is loaded or built at the first use."""
        small = replace(self.task, width=64, depth=1)
        for name in names:
            model, optimizers = self._build(name, CONTENDERS[name].rate, small)
            timer = PhaseTimer(model, optimizers)
            for step in range(2):
                timer.step(*self.sampler.batch_at(step))
            score_unless_diverged(model, self.val[:64], self.task.ctx, self.device)

    def best_of(self, name: str, rates: list[float]) -> dict[str, Any]:
        """The row of the rate with the least val loss; its "rates_tried" lists [rate, val loss] of every one."""
        rows = [self.train(name, rate) for rate in rates]
        best = min(rows, key=lambda row: math.inf if row["val_nats"] is None else row["val_nats"])
        return best | {"rates_tried": [[row["rate"], row["val_nats"]] for row in rows]}

    def train(self, name: str, rate: float) -> dict[str, Any]:
        """Train from the start, score and measure; the row."""
        task = self.task
        restartable = restart_peak(self.device)
        before = resident_bytes(self.device)
        model, optimizers = self._build(name, rate, task)
        timer = PhaseTimer(model, optimizers)
        tail = min(task.steps, 2 * HORIZON)
        watch = FlipWatch(model, tail, task.seed)
        if self.console is not None:
            self.console.print(f"{name}, rate {rate:g}")
        began, losses, curve = time.perf_counter(), [], []
        for step in range(task.steps):
            if step == task.steps - tail:
                watch.look()
            set_rates(optimizers, rate_factor(step, task.steps, WARMUP, 0.5))
            if name == "true-ternary" and self.scale_interval:
                self._let_scales_learn(optimizers, step)
            losses.append(timer.step(*self.sampler.batch_at(step)))
            if watch.looks:
                watch.look()
            if not math.isfinite(losses[-1]):
                break
            if (step + 1) % self.print_every == 0 or step + 1 == task.steps:
                recent = losses[-(step % self.print_every + 1) :]
                curve.append([(step + 1) * task.batch * task.ctx, statistics.fmean(recent)])
                show_loss(self.console, step + 1, task.steps, curve[-1][1])
        seconds, peak = time.perf_counter() - began, peak_bytes()
        found = (
            score_unless_diverged(model, self.val, self.task.ctx, self.device) if math.isfinite(losses[-1]) else None
        )
        report, where = audit(model, optimizers), surroundings(self.device)
        held, weights, phases = report["bytes_by_role"], report["weights"], timer.median_ms()
        bytes_seen = len(losses) * task.batch * task.ctx
        return {
            **{key: value for key, value in asdict(task).items() if key != "updates"},
            "bench": "true-ternary",
            "rule": name,
            "settings": self._settings(name) | self._switches(name),
            "rate": rate,
            "warmup": WARMUP,
            "decay": 0.5,
            "vocab": VOCAB,
            "weights": weights,
            "bytes_seen": bytes_seen,
            "first_loss": losses[0],
            "final_loss": losses[-1],
            "final_loss_mean": curve[-1][1] if found else None,
            "min_loss": min(losses) if found else None,
            "diverged": found is None,
            "val_nats": found.nats if found else None,
            "val_bpb": found.bpb if found else None,
            "scored": len(self.val),
            "state_bytes": report["state_bytes"],
            "bytes_per_weight": report["state_bytes"] / weights,
            "float_state_bytes": report["float_state_bytes"],
            "float_trainable": report["float_trainable"],
            "weight_bytes": sum(held.get(role, 0) for role in ("matrix", "embedding", "head", "vector")),
            "scale_bytes": held.get("scale", 0),
            "momentum_bytes": held.get("momentum", 0) + held.get("optimizer", 0),
            "gradient_bytes": timer.gradient_bytes,
            "peak_bytes": peak if restartable else None,
            "peak_growth": peak - before if restartable and before is not None else None,
            "step_ms": phases.pop("step"),
            "phases_ms": phases,
            "seconds": seconds,
            "flip_rate": watch.rate(max(1, task.steps // 10)),
            "flip_back": watch.back(),
            "zero_fraction": zero_share(model),
            "saturation": saturated_share(model) if name == "true-ternary" else None,
            "backends": backend_table() if CONTENDERS[name].ternary else {},
            "threads": where["threads"],
            "cpu": where["cpu"],
            "dtype": "float32",
            "commit": where["git_commit"],
            "tritwise": where["tritwise"],
            "curve": curve,
            "evals": [[bytes_seen, found.bpb]] if found else [],
            "reused": False,
        }

    def _settings(self, name: str) -> dict[str, Any]:
        return CONTENDERS[name].settings | self.settings.get(name, {})

    def _build(self, name: str, rate: float, task: Task) -> tuple[ByteLM, list[torch.optim.Optimizer]]:
        """A fresh model and its optimizers; none of these if nothing is to be updated."""
        shape = ModelConfig(width=task.width, depth=task.depth, ctx=task.ctx, vocab=VOCAB)
        model, optimizers = rule_called(CONTENDERS[name].rule).build(
            shape, self._settings(name) | {"rate": rate}, task.seed, torch.float32, task.steps, self.device
        )
        return model, optimizers if task.updates else []

    def _switches(self, name: str) -> dict[str, Any]:
        """What the flags say about this configuration; a float model has no ternary operations to choose for."""
        if not CONTENDERS[name].ternary:
            return {"update_backend": "auto" if self.task.updates else "none"}
        scales = {"scale_update_interval": self.scale_interval} if name == "true-ternary" else {}
        return {"update_backend": self.backend_name} | scales

    def _let_scales_learn(self, optimizers: list[torch.optim.Optimizer], step: int) -> None:
        """Layers move at every interval-th step, each at a step of its own: a turn is `interval` steps."""
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                due = step // group["interval"] % self.scale_interval == 0
                group["scale_rate"] = SCALE_RATE if due else 0.0
