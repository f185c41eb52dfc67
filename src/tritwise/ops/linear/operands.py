"""What the products with a ternary matrix read, decoded ahead of them.

Shape suffixes: O outputs, I inputs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tritwise.registers import scale_values


class Operand(NamedTuple):
    """A decoded matrix W [O, I]: what y = x W^T reads, and what dL/dx does. Empty, all None: nothing is decoded.

    weight   W in the type of the activations [O, I]; None if both products are rounded
    trits8   leading trits as float8 e4m3 [O, I], if x is rounded to float8; else None
    turned8  the same [I, O], if dL/dy is; else None
    scale_O  the scale of each row, float32 [O], if either is; else None
    ones     float32 [LONG] of ones, if dL/dy is rounded: scales of columns that have none; else None
    unit_x   the same of what a number of x is worth that was rounded by one factor for all rows; else None
    """

    weight: Tensor | None = None
    trits8: Tensor | None = None
    turned8: Tensor | None = None
    scale_O: Tensor | None = None
    ones: Tensor | None = None
    unit_x: Tensor | None = None

    def serves(self, dtype: torch.dtype) -> bool:
        """Whether it can be multiplied by activations of `dtype`."""
        return self.scale_O is not None if self.weight is None else self.weight.dtype == dtype


def operand(
    decode: Callable[..., Tensor],
    trits_float8: Callable[..., Tensor],
    register: Tensor,
    exponent: Tensor,
    group: int,
    dtype: torch.dtype,
    rounds: tuple[bool, bool],
    lead: int,
) -> Operand:
    """Of one matrix, by a backend's two functions. The other arguments as of `decode_many`, for one."""
    rounds_x, rounds_grad = rounds
    return Operand(
        None if rounds_x and rounds_grad else decode(register, exponent, group, dtype, lead),
        trits_float8(register, False) if rounds_x else None,
        trits_float8(register, True) if rounds_grad else None,
        scale_values(exponent).view(-1) if rounds_x or rounds_grad else None,
    )
