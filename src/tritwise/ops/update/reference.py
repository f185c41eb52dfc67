"""The oracle of momentum accumulation and register moves, in torch."""

from collections.abc import Callable, Sequence

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
    # The divisor is a tensor: CUDA multiplies by the reciprocal of a plain number, which is not the same float.
    ratio_O1 = peak_O1 / torch.full_like(peak_O1, MOMENTUM_LIMIT)
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


def accumulate_each(
    accumulate: Callable[..., Tensor],
    momenta: Sequence[Tensor],
    row_exponents: Sequence[Tensor],
    grads: Sequence[Tensor],
    decay: float,
    keys: Sequence[Key],
    live_keys: Tensor | None = None,
) -> Tensor:
    """`accumulate_momentum_many` by one tensor after the other; accumulate: some backend's `accumulate_momentum`."""
    if live_keys is not None:
        keys = [Key(*pair) for pair in live_keys.tolist()]
    parts = zip(momenta, row_exponents, grads, keys, strict=True)
    return torch.stack([accumulate(m, e, g, decay, key) for m, e, g, key in parts])


def move_each(
    move_one: Callable[..., Tensor],
    registers: Sequence[Tensor],
    directions: Sequence[Tensor],
    rates: Sequence[float],
    limit: int,
    keys: Sequence[Key],
    go: Tensor | None,
    live_rates: Tensor | None = None,
    live_keys: Tensor | None = None,
) -> Tensor:
    """`move_registers_many` by one tensor after the other; move_one: some backend's `move_registers`."""
    if live_rates is not None:
        rates = live_rates.tolist()
    if live_keys is not None:
        keys = [Key(*pair) for pair in live_keys.tolist()]
    parts = zip(registers, directions, rates, keys, strict=True)
    if go is not None and not go:
        return registers[0].new_zeros(len(registers), dtype=torch.int64)
    return torch.stack([move_one(r, d, rate, limit, key) for r, d, rate, key in parts])
