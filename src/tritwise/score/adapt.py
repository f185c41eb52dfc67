"""Test-time training: score a piece of text, then learn from it, then go on to the next.

Strictly score first: the probabilities of a piece stand before a weight moves for it, and a byte that was read is
trained on once. What moves is a copy; the model that was given stays as it is. A ternary model moves by the register
rule: full registers, or its scales only. A float model moves by AdamW.

After a step the copy reads the last `window - stride` bytes again, together with the next byte, since its keys and
values were made by the old weights. The row of that next byte was told before the step, and stands.

With `guard`, the model that was given reads the text beside it and a `Switch` chooses between the two: the result is
never worse than without learning by more than 0.0007 bits a byte, at the price of a second pass.
"""

import math
import time
from copy import deepcopy
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from tritwise.errors import UserError
from tritwise.nn import trit_modules
from tritwise.optim import TritOptimizer
from tritwise.score.protocol import START, WindowStream, device_of, fit_window
from tritwise.score.switch import WORST_BITS, Switch

Train = Literal["all", "scales"]
RATES = {"trit": 0.0002, "scales": 0.002, "adamw": 1e-4}
"""The rates that are taken for 0. trit: leading-trit units a step; scales: octaves a step; adamw: as of torch."""


class Adapted:
    """A Stream: `model`, which learns from what it has read.

    model: a Predictor and nn.Module whose log_probs can be differentiated. window, stride: as in `stream_of`.
    piece: bytes between two steps; 0: the stride. rate: of the step, RATES where it is 0.
    train: "all", or "scales": only the scale exponents of a ternary model. guard: see above. seed: of rounding.
    Raises UserError for a setting that cannot work.
    """

    def __init__(
        self,
        model: Any,
        *,
        window: int = 0,
        stride: int = 0,
        piece: int = 0,
        rate: float = 0.0,
        train: Train = "all",
        guard: bool = True,
        seed: int = 0,
    ) -> None:
        self.window, self.stride = fit_window(model, window, stride)
        self.piece, self.train, self.seed = piece or self.stride, train, seed
        ternary = isinstance(model, nn.Module) and any(True for _ in trit_modules(model))
        if not isinstance(model, nn.Module):
            raise UserError(f"{type(model).__name__} has no weights to train; score it without adaptation")
        if train not in ("all", "scales"):
            raise UserError(f"there is nothing called {train!r} to train; choose all or scales")
        if train == "scales" and not ternary:
            raise UserError("only a ternary model has scales to train; choose all")
        if not 1 <= self.piece <= self.window:
            raise UserError(f"piece {piece} does not fit the window; choose 1 to {self.window}")
        if not 0 <= rate < math.inf:
            raise UserError(f"rate is {rate}; it must be 0 (the default) or more and finite")
        self.kind = ("trit" if train == "all" else "scales") if ternary else "adamw"
        self.rate = rate or RATES[self.kind]
        self.model: Any = model
        self.steps = 0  # since the reset
        self.seconds = 0.0  # spent on learning and on the guard
        self.trained = f"{self.kind}: {sum(t.numel() for t in _moving(model, self.kind)):,} numbers"
        self._frozen = WindowStream(self.model, self.window, self.stride, device_of(model)) if guard else None
        self._begin()

    @property
    def declared(self) -> dict[str, Any]:
        """What this learned and how, for the result."""
        return {
            "adaptation": f"test-time training of {self.trained}, after every {self.piece} bytes at rate {self.rate:g}",
            "adapt_steps": self.steps,
            "adapt_seconds": self.seconds,
            "adapt_worst_bpb": WORST_BITS if self._frozen else None,
        }

    def reset(self) -> None:
        """Forget all that was read and learned."""
        if self.steps:
            self._begin()
        else:
            self._live.reset()
            self._clear()

    def log_probs(self) -> Tensor:
        """Natural logs [V] of the next byte."""
        live_V = self._live.log_probs()
        if self._frozen is None:
            return live_V
        return torch.from_numpy(self._switch.peek(_numpy(self._frozen.log_probs()), _numpy(live_V)))

    def read(self, ids: Tensor) -> Tensor:
        """int64 [T] -> [T, V]: what stood before each byte; then moves on, and learns where a piece ends."""
        told, rest = [], ids
        while len(rest) or not told:
            part = rest[: self.piece - self._since]
            told.append(self._read(part))
            rest = rest[len(part) :]
            if self._since == self.piece:
                began = time.perf_counter()
                self._learn()
                self._since = 0
                self.seconds += time.perf_counter() - began
        return torch.cat(told)

    def _read(self, ids: Tensor) -> Tensor:
        rows = self._live.read(ids)
        self._text = np.concatenate([self._text, ids.cpu().numpy()])[-self.window - 1 :]
        self._since += len(ids)
        if self._frozen is None:
            return rows
        began = time.perf_counter()
        trusted = _numpy(self._frozen.read(ids))
        blended = torch.from_numpy(self._switch.blend(trusted, _numpy(rows), ids.cpu().numpy()))
        self.seconds += time.perf_counter() - began
        return blended

    def _clear(self) -> None:
        self._text = np.full(1, START, np.int64)  # the last window + 1 bytes
        self._since = 0  # bytes read since the last step
        self._switch = Switch()
        if self._frozen is not None:
            self._frozen.reset()

    def _begin(self) -> None:
        """A fresh copy of the model, and an optimizer that knows nothing."""
        self.steps = 0
        with torch.inference_mode(False):
            copy: Any = deepcopy(self.model)
            for _, layer in trit_modules(copy):
                layer.trainable(True)
            self._registers = [layer.register for _, layer in trit_modules(copy)] if self.kind == "scales" else []
            self._optimizer = self._optimizer_of(copy)
        self._copy: Any = copy
        self._live = WindowStream(self._copy, self.window, self.stride, device_of(copy))
        self._clear()

    def _optimizer_of(self, copy: nn.Module) -> torch.optim.Optimizer:
        if self.kind == "trit":
            return TritOptimizer(copy, rate=self.rate, seed=self.seed)
        if self.kind == "scales":
            # The rate of registers only says that this is no warm-up: they are put back after every step.
            return TritOptimizer(copy, rate=1e-9, scale_rate=self.rate, direction="rms", seed=self.seed)
        moving = _moving(copy, self.kind)
        for tensor in moving:
            tensor.requires_grad_(True)
        return torch.optim.AdamW(moving, lr=self.rate, betas=(0.9, 0.95), weight_decay=0.0)

    def _learn(self) -> None:
        """One step on the piece that was just read; what the window holds before it is its context."""
        kept = [register.clone() for register in self._registers]
        with torch.inference_mode(False), torch.enable_grad():
            text = torch.from_numpy(self._text).to(self._live.device)
            rows_TV = self._copy.log_probs(text[None, :-1])[0]
            costs_T = -rows_TV.gather(1, text[1:, None])[:, 0]
            costs_T[-self.piece :].mean().backward()
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for register, before in zip(self._registers, kept, strict=True):
                register.copy_(before)
        self.steps += 1
        live = self._live
        live._begin(live._held[max(0, len(live._held) - (self.window - self.stride)) :])


def _moving(model: nn.Module, kind: str) -> list[Tensor]:
    """The tensors that learn."""
    layers = [layer for _, layer in trit_modules(model)]
    if kind == "trit":
        return [tensor for layer in layers for tensor in (layer.register, *layer.exponents())]
    if kind == "scales":
        return [exponent for layer in layers for exponent in layer.exponents()]
    return [tensor for tensor in model.parameters() if tensor.is_floating_point()]


def _numpy(rows: Tensor) -> np.ndarray:
    return rows.detach().float().cpu().numpy()
