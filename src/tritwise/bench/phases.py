"""Where the time of a step goes: forward, backward and update apart, timed on the device's own clock."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tritwise.models import ByteLM
from tritwise.nn import TritModule, trit_modules
from tritwise.nn.trit import Consumer
from tritwise.optim import TritOptimizer

PHASES = ("forward", "backward", "update")

Mark = Any
"""A moment: a CUDA event, or seconds."""


class Clock:
    """Moments in the device's own time: CUDA events, which nothing waits for, or the processor's clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Mark:
        """The moment at which the device gets here."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self) -> None:
        """Wait for the device: marks can be read afterwards."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, one: Mark, two: Mark) -> float:
        """From one mark to another. The device must have been waited for."""
        return one.elapsed_time(two) / 1000 if self.device.type == "cuda" else two - one

    def total(self, spans: Sequence[tuple[Mark, Mark]]) -> float:
        """Seconds of all spans together."""
        return sum(self.seconds(one, two) for one, two in spans)


class PhaseTimer:
    """Runs the steps of one model and remembers what each phase took, in seconds.

    A ternary layer's gradient goes to its optimizer in the middle of backward; what the optimizer does with it there
    counts as update. `gradient_bytes`: the most bytes of weight gradients that any step held at one time. Make it
    after the optimizers, which tell layers whom to give gradients to. Without optimizers gradients are dropped.
    loss: what to run instead of model.loss, such as a compiled form of it.
    """

    def __init__(
        self,
        model: ByteLM,
        optimizers: Sequence[torch.optim.Optimizer],
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.model, self.optimizers, self._loss = model, optimizers, loss or model.loss
        self.device = next(model.parameters()).device
        self.seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self.gradient_bytes = 0
        self._clock = Clock(self.device)
        self._consuming: list[tuple[Mark, Mark]] = []
        for _, layer in trit_modules(model):
            layer.consumer = self._timed(layer.consumer)

    def step(self, ids: Tensor, targets: Tensor) -> float:
        """One optimizer step on ids, targets (int64 [B, T] each); returns the loss in nats per byte."""
        return self.step_on([(ids, targets)])

    def step_on(self, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
        """One optimizer step on several micro-batches; returns the loss of the last. Gradients are added up."""
        spans: dict[str, list[tuple[Mark, Mark]]] = {phase: [] for phase in PHASES}
        self._consuming = []
        losses, mark = [], self._clock.mark
        for ids, targets in batches:
            ids, targets = ids.to(self.device), targets.to(self.device)
            began = mark()
            losses.append(self._loss(ids, targets))
            passed = mark()
            losses[-1].backward()
            spans["forward"].append((began, passed))
            spans["backward"].append((passed, mark()))
            losses[-1] = losses[-1].detach()
        held = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        self.gradient_bytes = max(self.gradient_bytes, held)
        resumed = mark()
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        spans["update"].append((resumed, mark()))
        self._clock.wait()
        took = {phase: self._clock.total(spans[phase]) for phase in PHASES}
        consuming = self._clock.total(self._consuming)
        took["backward"] -= consuming
        took["update"] += consuming
        for phase in PHASES:
            self.seconds[phase].append(took[phase])
        return losses[-1].item()

    def median_ms(self) -> dict[str, float]:
        """Median milliseconds of each phase, and of the whole "step"."""
        steps = [sum(parts) for parts in zip(*self.seconds.values(), strict=True)]
        return {name: 1000 * statistics.median(times) for name, times in (self.seconds | {"step": steps}).items()}

    def _timed(self, consumer: Consumer | None) -> Consumer:
        def take(layer: TritModule, grad: Tensor) -> None:
            waiting = sum(o.waiting_bytes for o in self.optimizers if isinstance(o, TritOptimizer))
            self.gradient_bytes = max(self.gradient_bytes, grad.nbytes + waiting)
            if consumer is not None:
                began = self._clock.mark()
                consumer(layer, grad)
                self._consuming.append((began, self._clock.mark()))

        return take


@contextmanager
def update_spans(optimizers: Sequence[torch.optim.Optimizer], clock: Clock) -> Iterator[list[tuple[Mark, Mark]]]:
    """Within the block, what optimizers do is noted span by span in the list that comes: their steps, and the gradients
    that a TritOptimizer takes. For a step whose forward and backward are replayed as one, into which nobody can look.
    """
    spans: list[tuple[Mark, Mark]] = []

    def timed(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            began = clock.mark()
            told = run(*arguments)
            spans.append((began, clock.mark()))
            return told

        return call

    for optimizer in optimizers:
        optimizer.step = timed(optimizer.step)  # type: ignore[method-assign]
        if isinstance(optimizer, TritOptimizer):
            optimizer.consume = timed(optimizer.consume)  # type: ignore[method-assign]
    try:
        yield spans
    finally:
        for optimizer in optimizers:
            for name in ("step", "consume"):
                optimizer.__dict__.pop(name, None)
