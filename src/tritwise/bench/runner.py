"""Who takes part in the engine's benchmarks, and one contender's model taking real steps."""

import difflib
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritwise.bench.phases import Clock, PhaseTimer, update_spans
from tritwise.bench.rules import rule_called
from tritwise.bench.sizes import Size, build_quickly
from tritwise.data.sampler import Sampler
from tritwise.data.source import describe
from tritwise.data.split import named_part, split
from tritwise.errors import UserError
from tritwise.train.device import record_moves
from tritwise.train.stepper import Stepper, loss_of

BATCHES = 4  # batches that steps go through in turn; they lie on the device, so reading is not measured


class Entry(NamedTuple):
    """Who takes part: a rule (bench/rules.py), its rate and settings. `held`: bytes a weight at the peak of a step,
    gradients included, as a first guess."""

    rule: str
    rate: float
    settings: dict[str, Any]
    held: float


TURNS = {"interval": 2, "embedding_interval": 1, "head_interval": 1}
"""Matrices move at every second step, by twice as much: three seeds told no difference (docs/RULE.md)."""

ENTRIES = {
    "ours": Entry("ours", 0.03, {}, 2.1),
    "ours-fp8": Entry("ours", 0.03, {"fp8": True}, 2.1),
    "ours-turns": Entry("ours", 0.03, TURNS, 2.1),
    "ours-turns-fp8": Entry("ours", 0.03, {"fp8": True} | TURNS, 2.1),
    "ours-compact": Entry("ours", 0.03, {"compact": True}, 1.15),
    "adamw": Entry("adamw", 3e-4, {}, 16.0),
    "adamw-bf16": Entry("adamw-bf16", 3e-4, {}, 8.0),
    "muon": Entry("muon", 0.01, {}, 12.0),
    "bitnet": Entry("bitnet-adamw", 3e-4, {}, 16.0),
}


def entries_called(names: Sequence[str]) -> dict[str, Entry]:
    """The contenders of these names, each once. Raises UserError, naming the nearest, for one that is not there."""
    if not names:
        raise UserError(f"no contender is named; choose of {', '.join(ENTRIES)}")
    for name in names:
        if name not in ENTRIES:
            near = difflib.get_close_matches(name, ENTRIES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose of {', '.join(ENTRIES)}"
            raise UserError(f"there is no contender {name!r}; {hint}")
    return {name: ENTRIES[name] for name in names}


class Batches:
    """The first `count` batches of a text on the device, over and over. A batch is `accum` micro-batches of ids and
    targets, int64 [B, T] each."""

    def __init__(
        self, size: Size, device: torch.device, data: str = "shakespeare", seed: int = 0, count: int = BATCHES
    ) -> None:
        text = named_part(split(describe(data).data, "90/10"), "train")
        sampler = Sampler(text, size.batch, size.config.ctx, seed, accum=size.accum)
        self._kept = [
            [tuple(part.to(device) for part in sampler.batch_at(step, micro)) for micro in range(size.accum)]
            for step in range(count)
        ]

    def __getitem__(self, number: int) -> list[tuple[Tensor, Tensor]]:
        return self._kept[number % len(self._kept)]  # type: ignore[return-value]


class Runner:
    """A contender's model and optimizers, taking real steps in a mode of bench/sizes.py. Remembers every loss."""

    def __init__(
        self, entry: Entry, size: Size, batches: Batches, device: torch.device, dtype: torch.dtype, seed: int = 0
    ) -> None:
        settings = entry.settings | {"rate": entry.rate}
        self.model, self.optimizers = build_quickly(rule_called(entry.rule), size.config, settings, dtype, device, seed)
        self.model.checkpoint = size.checkpoint
        record_moves(self.optimizers, compiled=size.mode != "eager")
        self.losses: list[Tensor] = []
        self.mode, self._batches, self._clock = size.mode, batches, Clock(device)
        whole, graph = self.mode in ("whole", "graph"), self.mode.endswith("graph")
        if self.mode != "eager":
            # Models of one shape share what was compiled, whatever their weights; another rule adds to it.
            torch._dynamo.config.recompile_limit = 256
        blocks = self.mode.startswith("blocks")
        self._loss = loss_of(self.model, compile=whole, blocks=blocks)
        self._stepper = Stepper(self.model, self.optimizers, compile=whole, blocks=blocks, graph=graph)
        # Without optimizers a step only adds to the gradients: that is every micro-batch but the last.
        self._adder = Stepper(self.model, [], compile=whole, blocks=blocks)
        self._round = self._stepper.phases

    def step(self) -> None:
        """One optimizer step on the next batch; the device is not waited for."""
        *others, last = self._batches[len(self.losses)]
        for ids, targets in others:
            self._adder.step(ids, targets)
        self.losses.append(self._stepper.step(*last).clone())

    def turn(self, steps: int) -> float:
        """Seconds a step over `steps` of them, or as many more as every layer then has moved as often as any other,
        after a round of turns that does not count."""
        for _ in range(self._round):
            self.step()
        steps = -(-steps // self._round) * self._round
        self._clock.wait()
        began = self._clock.mark()
        for _ in range(steps):
            self.step()
        ended = self._clock.mark()
        self._clock.wait()
        return self._clock.seconds(began, ended) / steps

    def phases(self, steps: int) -> dict[str, float]:
        """Median milliseconds of the parts of a step: forward, backward, update. Where a graph holds both, forward and
        backward are one. Steps taken afterwards are slower: this comes last."""
        steps = -(-steps // self._round) * self._round
        if not self.mode.endswith("graph"):
            timer = PhaseTimer(self.model, self.optimizers, self._loss)
            for _ in range(steps + 1):
                self.losses.append(torch.tensor(timer.step_on(self._batches[len(self.losses)])))
            for times in timer.seconds.values():
                del times[0]
            found = timer.median_ms()
            found.pop("step")
            return found
        wholes, updates = [], []
        with update_spans(self.optimizers, self._clock) as spans:
            for _ in range(steps + 1):
                spans.clear()
                began = self._clock.mark()
                self.step()
                ended = self._clock.mark()
                self._clock.wait()
                wholes.append(self._clock.seconds(began, ended))
                updates.append(self._clock.total(spans))
        update = 1000 * statistics.median(updates[1:])
        return {"forward_backward": 1000 * statistics.median(wholes[1:]) - update, "update": update}
