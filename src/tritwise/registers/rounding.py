"""Stochastic rounding in fixed point: a real number becomes one of its two neighbouring integers, unbiased.

x is first put on a grid of 2**-16, then 16 random bits are added and the fraction is cut off. After the one float
product that `to_fixed_point` is given, everything is integer: no order of operations or fused multiply-add can change
a bit. Sixteen bits matter: with eight, the cut would drift by 1/512 of a unit a step.
"""

import torch
from torch import Tensor

FRACTION_BITS = 16
_ONE = 1 << FRACTION_BITS
_HALF = _ONE >> 1


def to_fixed_point(x: Tensor, scale: float = 1.0, limit: int = 127) -> Tensor:
    """rint(x * scale * 65536) as int32, clamped to +-limit units. x is float32 of any shape and is not changed.

    limit is in whole units and at most 255, so that every value is exact in float32 before it becomes an integer.
    """
    assert 0 < limit <= 255, "up to 255 units every value is exact in float32 before it becomes an integer"
    return torch.mul(x, scale * _ONE).round_().clamp_(-limit * _ONE, limit * _ONE).to(torch.int32)


def round_stochastic(fixed: Tensor, bits16: Tensor) -> Tensor:
    """floor((fixed + u) / 65536) with u uniform in 0 … 65535: the int32 steps a register takes. Changes `fixed`.

    fixed: int32 from `to_fixed_point`. bits16: int16 of the same number of elements from `random_bits16`.
    The expected value is fixed / 65536 exactly.
    """
    fixed += bits16.view(fixed.shape)
    return fixed.add_(_HALF).bitwise_right_shift_(FRACTION_BITS)
