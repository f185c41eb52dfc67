"""Learned vectors without a float: a table of int8 fixed-point numbers that moves by the register rule.

Gains, mixes and embeddings of a loop are a handful of numbers a channel; a trit each would be too coarse for them, so
here the whole register is the number, not its leading trit. `FloatVector` is the float twin for baselines.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tritwise.nn.trit import TritModule
from tritwise.registers import exponent_for

UNIT = 2.0**-6  # what one step of a register is worth: a table reaches base +- 121/64, in steps of 1/64


class TritVector(TritModule):
    """Numbers base + register / 64, float32 [rows, columns], that start at their base.

    base: one number for all rows, or one a row. The role is "vector": the optimizer's direction for it is its momentum
    over its RMS, and a rate of r moves a number by 81/64 r a step. The exponents hold the unit and never move.
    A register of 7 bits times a power of two is exact in bfloat16.
    """

    base: Tensor
    learns_scale = False

    def __init__(self, rows: int, columns: int, base: float | Sequence[float] = 0.0) -> None:
        super().__init__(rows, columns, role="vector", fan_in=1, group=columns)
        _give_base(self, base, rows)

    @torch.no_grad()
    def reset_parameters(self, span: float = 0.0) -> None:
        """Every number at its base."""
        self.register.zero_()
        self.exponent.fill_(exponent_for(UNIT))

    def trits(self) -> Tensor:
        """The numbers that are used: whole registers, int8 [rows, columns]."""
        return self.register.detach()

    def forward(self) -> Tensor:
        value = self.register.to(torch.float32) * UNIT + self.base
        return value if self.port is None else value + self.port


class FloatVector(nn.Module):
    """The same numbers as base + a float weight [rows, columns] that starts at 0."""

    base: Tensor

    def __init__(self, rows: int, columns: int, base: float | Sequence[float] = 0.0) -> None:
        super().__init__()
        self.roles = {"weight": "vector"}
        self.weight = nn.Parameter(torch.zeros(rows, columns))
        _give_base(self, base, rows)

    def forward(self) -> Tensor:
        return self.weight + self.base


def _give_base(layer: TritVector | FloatVector, base: float | Sequence[float], rows: int) -> None:
    """A constant [rows, 1], which is part of the model's shape and not of what it learned."""
    found = [float(base)] * rows if isinstance(base, int | float) else [float(number) for number in base]
    if len(found) != rows:
        raise ValueError(f"{len(found)} bases do not fit {rows} rows; give one number, or one a row")
    layer.roles["base"] = "table"
    layer.register_buffer("base", torch.tensor(found)[:, None], persistent=False)
