"""A mean of the weights along the end of a run (SWA, Izmailov et al. 2018), scored beside the weights themselves.

Float weights are averaged in float32. Of ternary weights the registers are: their mean, rounded to a whole register,
gives new leading trits, so a weight is what it was most of the time. Sums of registers are integers: a resumed run has
the same mean to the last bit, and a model without floats has none here either.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor, nn

from tritwise.nn import TritModule
from tritwise.registers import leading_trit

M = TypeVar("M", bound=nn.Module)


class Average:
    """Sums over the moments that `add` was called at; `count` of them."""

    def __init__(self) -> None:
        self.count, self._sums = 0, dict[str, Tensor]()

    @torch.no_grad()
    def add(self, model: nn.Module) -> None:
        """Take note of the weights as they are now."""
        self.count += 1
        for name, tensor in model.named_parameters():
            kind = torch.float32 if tensor.is_floating_point() else torch.int32
            if name not in self._sums:
                self._sums[name] = torch.zeros_like(tensor, dtype=kind)
            self._sums[name] += tensor

    @torch.no_grad()
    def of(self, model: M) -> M:
        """A copy of `model` with the mean weights. At least one moment must have been added."""
        assert self.count, "a mean needs at least one moment"
        copy = deepcopy(model)
        for name, tensor in copy.named_parameters():
            total = self._sums[name]
            if tensor.is_floating_point():
                tensor.copy_(total / self.count)
            else:  # rounded to the nearest integer, halves upwards
                tensor.copy_(torch.div(2 * total + self.count, 2 * self.count, rounding_mode="floor"))
        return copy

    def state(self) -> tuple[dict[str, Tensor], int]:
        """What `restore` takes: tensors by name, and the count."""
        return self._sums, self.count

    def restore(self, sums: dict[str, Tensor], count: int, device: torch.device) -> None:
        """Go on from a state."""
        self._sums, self.count = {name: tensor.clone().to(device) for name, tensor in sums.items()}, count


def changed_trits(model: nn.Module, other: nn.Module) -> float:
    """The share of leading trits in which two models of one shape differ."""
    pairs = list(zip(_registers(model), _registers(other), strict=True))
    differ = sum(int((leading_trit(one) != leading_trit(two)).sum()) for one, two in pairs)
    return differ / max(1, sum(one.numel() for one, _ in pairs))


def _registers(model: nn.Module) -> Iterator[Tensor]:
    return (m.register for m in model.modules() if isinstance(m, TritModule) and m.role != "vector")
