"""The oracle of momentum accumulation and register moves, in torch."""

import torch
from torch import Tensor

from tritwise.registers import Key, leading_trit, move, random_bits16, round_stochastic, to_fixed_point

MOMENTUM_LIMIT = 127
EXPONENT_FLOOR, EXPONENT_CEILING = -126, 120  # 2**E and 127 * 2**E stay normal float32 numbers


def power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent as float32, exact: the bits are put together, not computed. Same shape as the int8 input."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def accumulate_momentum(momentum: Tensor, row_exponent: Tensor, grad: Tensor, decay: float, key: Key) -> Tensor:
    """See `tritwise.ops.update.accumulate_momentum`."""
    # decay * momentum is formed first and alone, so that a fused multiply-add cannot change the sum.
    value_OI = momentum.to(torch.float32).mul_(power_of_two(row_exponent) * decay).add_(grad)
    peak_O1 = torch.linalg.vector_norm(value_OI, ord=float("inf"), dim=1, keepdim=True)
    if not torch.isfinite(peak_O1).all():  # the norm hands a NaN on; an overflowed sum is refused too
        return torch.zeros((), dtype=torch.bool, device=momentum.device)
    # The least e with peak * 2**-e < 127: frexp gives peak/127 = f * 2**e with 0.5 <= f < 1, exactly. A row of zeros
    # takes the floor; frexp's 0 would stand above tiny rows and push them out of float range in the direction.
    ratio_O1 = peak_O1 / MOMENTUM_LIMIT
    exponent_O1 = torch.frexp(ratio_O1).exponent.masked_fill_(ratio_O1 == 0, EXPONENT_FLOOR)
    exponent_O1.clamp_(EXPONENT_FLOOR, EXPONENT_CEILING)
    fixed_OI = to_fixed_point(value_OI.mul_(power_of_two(-exponent_O1)), limit=MOMENTUM_LIMIT)
    steps_OI = round_stochastic(fixed_OI, random_bits16(momentum.numel(), key, momentum.device))
    momentum.copy_(steps_OI.clamp_(-MOMENTUM_LIMIT, MOMENTUM_LIMIT))
    row_exponent.copy_(exponent_O1)
    return torch.ones((), dtype=torch.bool, device=momentum.device)


def move_registers(register: Tensor, direction: Tensor, rate: float, limit: int, key: Key) -> Tensor:
    """See `tritwise.ops.update.move_registers`."""
    fixed = to_fixed_point(direction, -rate, limit=2 * MOMENTUM_LIMIT)
    steps = round_stochastic(fixed, random_bits16(register.numel(), key, register.device))
    before = leading_trit(register)
    register.copy_(move(register, steps, limit))
    return torch.count_nonzero(before != leading_trit(register))
