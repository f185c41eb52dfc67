"""How ternary weights move: a fixed sample of them, looked at after every step, on the device and without waiting.

Shape suffixes: S looks (the first before any step), N sampled weights.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tritwise.nn import TritVector, trit_modules
from tritwise.registers import REGISTER_LIMIT

SAMPLE = 16_384  # weights: a rate of 1e-4 a step is known within 3 % after 200 steps
HORIZON = 100  # steps within which a flip may be taken back


def showing_trits(model: nn.Module) -> list[Any]:
    """The layers of `model` whose matmul uses ternary weights: those with a method `trits`, less learned vectors."""
    found = [module for module in model.modules() if callable(getattr(module, "trits", None))]
    return [module for module in found if not isinstance(module, TritVector)]


class FlipWatch:
    """The course of up to `count` ternary weights of `model` over `steps` steps: one byte a weight and step.

    Call `look` once before the first step of the watch and once after each. The sample depends on `seed` and the shapes
    of the layers alone. Without ternary layers everything is None.
    """

    def __init__(self, model: nn.Module, steps: int, seed: int, count: int = SAMPLE) -> None:
        sizes = [(layer, layer.trits()) for layer in showing_trits(model)]
        total = sum(trits.numel() for _, trits in sizes)
        if total <= count:
            chosen = torch.arange(total)
        else:
            chosen = torch.randint(total, (count,), generator=torch.Generator().manual_seed(seed)).sort().values
        self._parts: list[tuple[Any, Tensor]] = []
        start = 0
        for layer, trits in sizes:
            mine = chosen[(chosen >= start) & (chosen < start + trits.numel())] - start
            self._parts.append((layer, mine.to(trits.device)))
            start += trits.numel()
        self.looks = 0
        self.history_SN = torch.empty(0, 0, dtype=torch.int8)
        if total:
            self.history_SN = torch.empty(steps + 1, len(chosen), dtype=torch.int8, device=sizes[0][1].device)

    @torch.no_grad()
    def look(self) -> None:
        """Write down what the sampled weights are now."""
        if self._parts:
            torch.cat(
                [layer.trits().reshape(-1)[index] for layer, index in self._parts], out=self.history_SN[self.looks]
            )
            self.looks += 1

    def rate(self, last: int) -> float | None:
        """Flips per weight and step over the `last` steps (or all there were)."""
        return flip_rate(self.history_SN[: self.looks][-last - 1 :])

    def back(self, horizon: int = HORIZON) -> float | None:
        """Share of the flips that were taken back within `horizon` steps."""
        return flip_back(self.history_SN[: self.looks], horizon)


def flip_rate(history_SN: Tensor) -> float | None:
    """Share of (weight, step) pairs at which the trit changed; None without a step."""
    if history_SN.shape[0] < 2 or not history_SN.shape[1]:
        return None
    return float((history_SN[1:] != history_SN[:-1]).float().mean())


def flip_back(history_SN: Tensor, horizon: int = HORIZON) -> float | None:
    """Share of flips after which the weight was what it had been before, at least once within `horizon` steps.

    Only flips that were watched for the whole horizon count. None if there is no such flip.
    """
    counted = history_SN.shape[0] - 1 - horizon  # flips at steps 1 … counted
    if counted < 1 or not history_SN.shape[1]:
        return None
    before, flipped = history_SN[:counted], history_SN[1 : counted + 1] != history_SN[:counted]
    undone = torch.zeros_like(flipped)
    for later in range(1, horizon + 1):
        undone |= history_SN[1 + later : 1 + later + counted] == before
    flips = int(flipped.sum())
    return int((undone & flipped).sum()) / flips if flips else None


def saturated_share(model: nn.Module) -> float:
    """Share of registers at their limits."""
    registers = [layer.register for _, layer in trit_modules(model)]
    full = sum(int((register.abs() == REGISTER_LIMIT).sum()) for register in registers)
    return full / sum(register.numel() for register in registers)


@torch.no_grad()
def zero_share(model: nn.Module) -> float | None:
    """Share of zeros among the ternary weights of `model`; None if it has none."""
    trits = [layer.trits() for layer in showing_trits(model)]
    count = sum(t.numel() for t in trits)
    return sum(int((t == 0).sum()) for t in trits) / count if count else None
