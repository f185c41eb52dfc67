"""One run of one rule: a `Cell` says everything that shapes it, `run_cell` trains it and returns a row of plain JSON.

Cells that differ in nothing but rule, rate and settings start from the same seed, read the same batches in the same
order, follow the same schedule and are scored on the same bytes.
"""

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from tritwise.bench.flips import FlipWatch, saturated_share, showing_trits, zero_share
from tritwise.bench.phases import Clock
from tritwise.bench.rules import rule_called
from tritwise.data.sampler import Sampler
from tritwise.data.source import BUNDLED_NAMES, describe
from tritwise.data.split import Split, named_part, split
from tritwise.errors import UserError
from tritwise.files import canonical_json, finite
from tritwise.models import ModelConfig
from tritwise.optim import TritOptimizer, rate_factor
from tritwise.score import score_unless_diverged
from tritwise.train.audit import audit
from tritwise.train.device import DTYPES, batch_on
from tritwise.train.optimizers import set_rates
from tritwise.train.run import surroundings
from tritwise.train.stepper import Stepper

POINTS = 200  # of a training curve, at the most
BLOCK = 10  # steps between two readings of the clock
WATCHED = 200  # steps at the end over which flips are watched, at the least
DIVERGED = 1.0  # nats above its first loss at which a run counts as diverged

Tell = Callable[[int], None]


@dataclass(frozen=True)
class Cell:
    """One run. Raises UserError for a value that cannot work.

    rule, rate, settings   a name in RULES, its rate, and settings of that rule other than its defaults
    seed                   of the initial weights, the batches and the rounding
    steps, batch, ctx      optimizer steps, sequences a step, bytes of context
    width, depth, shape    the model; `shape` holds further settings of ModelConfig, such as ngrams
    warmup, decay          of `optim.rate_factor`: steps of linear rise, share of the steps of linear fall at the end
    data, split            text (a path, or shakespeare) and how train and val are cut from it
    dtype                  of the activations: float32 or bfloat16
    stride                 of the score's window; 0: ctx, the chunked score
    eval_interval          steps between scores of the whole val part; 0: only at the end
    bench                  which benchmark the run belongs to
    """

    rule: str
    rate: float
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    steps: int = 200
    batch: int = 16
    ctx: int = 64
    width: int = 64
    depth: int = 2
    shape: dict[str, Any] = field(default_factory=dict)
    warmup: int = 20
    decay: float = 0.5
    data: str = "shakespeare"
    split: str = "90/10"
    dtype: str = "float32"
    stride: int = 0
    eval_interval: int = 0
    bench: str = "rules"

    def __post_init__(self) -> None:
        for name, least in (
            ("seed", 0),
            ("steps", 1),
            ("batch", 1),
            ("warmup", 0),
            ("stride", 0),
            ("eval_interval", 0),
        ):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise UserError(f"rate is {self.rate}; it must be a finite number above 0")
        if not 0 <= self.decay <= 1:
            raise UserError(f"decay is {self.decay}; it is a share of the steps, 0 to 1")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype is {self.dtype!r}; choose one of {', '.join(DTYPES)}")
        if self.stride > self.ctx:
            raise UserError(f"stride is {self.stride}; the score's window moves by at most ctx, {self.ctx}")
        rule_called(self.rule).check(self.settings)
        self.model_config()
        Split(self.split)

    def model_config(self) -> ModelConfig:
        """The shape of the model. Raises UserError if it cannot be built."""
        try:
            return ModelConfig(**{"width": self.width, "depth": self.depth, "ctx": self.ctx, **self.shape})
        except TypeError:
            known = {entry.name for entry in dataclasses.fields(ModelConfig)}
            unknown = sorted(set(self.shape) - known)
            raise UserError(f"there is no setting {unknown[0]!r} of a model; choose of {', '.join(known)}") from None

    @property
    def data_name(self) -> str:
        """The text's name without where it lies, which is nobody's business."""
        return "shakespeare" if self.data in BUNDLED_NAMES else Path(self.data).resolve().name

    def settled(self) -> dict[str, Any]:
        """Everything that shapes the run, as plain JSON: the cell with the text's name in place of its path."""
        return dataclasses.asdict(self) | {"data": self.data_name}

    @property
    def key(self) -> str:
        """16 hex digits that only an equal cell shares; a text counts by its name."""
        return hashlib.sha256(canonical_json(self.settled())).hexdigest()[:16]


def load_parts(data: str, rule: str, batch: int, ctx: int) -> dict[str, np.ndarray]:
    """The train and val parts of a text. Raises UserError if it cannot be read or is too short for the batches."""
    parts = split(describe(data).data, rule)
    Sampler(named_part(parts, "train"), batch, ctx, seed=0)
    return parts


def run_cell(
    cell: Cell,
    parts: dict[str, np.ndarray],
    device: torch.device | str = "cpu",
    *,
    compile: bool = False,
    tell: Tell | None = None,
) -> dict[str, Any]:
    """Train and score one cell; its row. A run that diverges is a row too: "diverged" is true and val is None.

    parts: uint8 arrays "train" and "val". compile: compiled, and on a GPU replayed as one graph. tell: called with the
    number of steps done, now and then.
    """
    device = torch.device(device)
    if device.index is not None:
        torch.cuda.set_device(device)
    sampler = Sampler(parts["train"], cell.batch, cell.ctx, cell.seed)
    model, optimizers = rule_called(cell.rule).build(
        cell.model_config(),
        cell.settings | {"rate": cell.rate},
        cell.seed,
        DTYPES[cell.dtype],
        cell.steps,
        device,
    )
    if compile:
        # Models of one shape share what was compiled, whatever their weights; every other shape or rule adds to it.
        torch._dynamo.config.recompile_limit = 256
    stepper = Stepper(model, optimizers, compile=compile, graph=compile and device.type == "cuda", seed=cell.seed)
    tail = min(cell.steps, max(WATCHED, cell.steps // 10))
    watch = FlipWatch(model, tail, cell.seed)
    losses = torch.full((cell.steps,), math.nan, device=device)
    clock, evals, away = _Blocks(device), [], 0.0
    scored = partial(score_unless_diverged, model, parts["val"], cell.stride or cell.ctx, device)
    bytes_a_step, glance = cell.batch * cell.ctx, max(1, cell.steps // 20)
    began = time.perf_counter()
    batch = batch_on(device, sampler, 0, 0)
    done = 0
    while done < cell.steps:
        if done == cell.steps - tail:
            watch.look()
        if done % BLOCK == 0 or watch.looks:
            clock.mark(done, watched=bool(watch.looks))
        set_rates(optimizers, rate_factor(done, cell.steps, cell.warmup, cell.decay))
        losses[done] = stepper.step(*batch)
        done += 1
        if watch.looks:
            clock.mark(done, watched=True)
            clock.forget()
            watch.look()
        if done < cell.steps:
            batch = batch_on(device, sampler, done, 0)  # while the device is still at the step before
        # Waiting for the device stops a hopeless run early; twenty times in a run cost nothing.
        if done % glance == 0 or done == cell.steps:
            if tell is not None:
                tell(done)
            if not math.isfinite(float(losses[done - 1])):
                break
        if cell.eval_interval and done % cell.eval_interval == 0 and done < cell.steps:
            clock.forget()
            paused = time.perf_counter()
            if told := scored():
                evals.append([done * bytes_a_step, told.bpb])
            away += time.perf_counter() - paused
    clock.mark(done, watched=bool(watch.looks))
    seconds = time.perf_counter() - began - away
    course = losses[:done].tolist()
    diverged = _diverged(course)
    final = None if diverged else scored()
    if final is not None:
        evals.append([done * bytes_a_step, final.bpb])
    report, where = audit(model, optimizers), surroundings(device)
    # Constant trits are no trained weights to an audit, but they are the weights of this model.
    weights = report["weights"] or sum(layer.trits().numel() for layer in showing_trits(model))
    row = {
        **cell.settled(),
        "key": cell.key,
        "weights": weights,
        "bytes_seen": done * bytes_a_step,
        "diverged": final is None,
        "val_bpb": final.bpb if final else None,
        "val_nats": final.nats if final else None,
        "train_nats": _mean(course[-max(1, cell.steps // 20) :]),
        "scored": len(parts["val"]),
        "state_bytes": report["state_bytes"],
        "bytes_per_weight": round(report["state_bytes"] / weights, 4),
        "float_state_bytes": report["float_state_bytes"],
        "float_trainable": report["float_trainable"],
        "flip_rate": watch.rate(max(1, cell.steps // 10)),
        "flip_back": watch.back(),
        "zero_fraction": zero_share(model),
        "saturation": _saturation(model, optimizers),
        "seconds": round(seconds, 3),
        "step_ms": clock.step_ms(),
        "compile": compile,
        "device": where["device"],
        "cpu": where["cpu"],
        "threads": where["threads"],
        "torch": where["torch"],
        "commit": where["git_commit"],
        "tritwise": where["tritwise"],
        "curve": _curve(course, bytes_a_step),
        "evals": evals,
    }
    return finite(row)


def _diverged(course: list[float]) -> bool:
    """Whether a loss was no number, or the last tenth of the losses lies far above the first."""
    if not all(map(math.isfinite, course)):
        return True
    return _mean(course[-max(1, len(course) // 10) :]) > course[0] + DIVERGED


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _curve(course: list[float], bytes_a_step: int) -> list[list[float]]:
    """[bytes seen, mean loss since the point before] at no more than POINTS points."""
    size = -(-len(course) // POINTS)
    return [
        [min(start + size, len(course)) * bytes_a_step, round(_mean(course[start : start + size]), 5)]
        for start in range(0, len(course), size)
    ]


def _saturation(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> float | None:
    """Share of registers at their limits, where registers hold evidence: None for any other rule."""
    if not any(isinstance(optimizer, TritOptimizer) for optimizer in optimizers):
        return None
    return saturated_share(model)


class _Blocks:
    """When steps were done, read at the end, so that no step waits for the clock."""

    def __init__(self, device: torch.device) -> None:
        self._clock = Clock(device)
        self._marks: list[tuple[int, Any, bool] | None] = []  # None: something other than steps came between

    def mark(self, done: int, *, watched: bool) -> None:
        """`done` steps are done. `watched`: flips are being watched between the steps, which may slow them."""
        self._marks.append((done, self._clock.mark(), watched))

    def forget(self) -> None:
        """Something other than steps happens now."""
        self._marks.append(None)

    def step_ms(self) -> float | None:
        """Median milliseconds a step over blocks of steps, without the first and, if others are left, watched ones."""
        self._clock.wait()
        blocks: list[tuple[float, bool]] = []
        for one, two in pairwise(self._marks):
            if one is not None and two is not None and two[0] > one[0]:
                took = 1000 * self._clock.seconds(one[1], two[1])
                blocks.append((took / (two[0] - one[0]), two[2]))
        blocks = blocks[1:] or blocks
        times = [took for took, watched in blocks if not watched] or [took for took, _ in blocks]
        return round(median(times), 4) if times else None
