"""The oracle of nibble registers, in torch.

Suffixes: O rows, I columns, G groups of columns, K columns of a group.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from tritwise.ops.update.reference import power_of_two
from tritwise.registers import (
    EXPONENT_LIMIT,
    EXPONENTS_PER_OCTAVE,
    NIBBLE_LEAD,
    NIBBLE_LIMIT,
    Key,
    join_nibbles,
    leading_trit,
    level_values,
    nearest_level,
    random_level,
    round_stochastic,
    scale_table,
    scale_values,
    split_nibbles,
    to_fixed_point,
    weyl_bits16,
)

GROUP = 32  # columns that share a unit
EXPONENT_FLOOR, EXPONENT_CEILING = -110, 124  # of rows: units from 2**-126 on are normal floats, 7 units are finite


def accumulate_nibble_many(
    registers: Sequence[Tensor],
    row_exponents: Sequence[Tensor],
    group_exponents: Sequence[Tensor],
    grads: Sequence[Tensor],
    decay: float,
    keys: Sequence[Key],
    phase: int | Tensor,
) -> Tensor:
    """See `tritwise.ops.nibble.accumulate_nibble_many`."""
    parts, when = zip(registers, row_exponents, group_exponents, grads, keys, strict=True), int(phase)
    return torch.stack([_accumulate(b, row, group, grad, decay, key, when) for b, row, group, grad, key in parts])


def move_nibbles_many(
    registers: Sequence[Tensor],
    directions: Sequence[Tensor],
    rates: Sequence[float] | Tensor,
    keys: Sequence[Key],
    phase: int | Tensor,
    go: Tensor | None,
) -> Tensor:
    """See `tritwise.ops.nibble.move_nibbles_many`."""
    numbers = rates.tolist() if isinstance(rates, Tensor) else rates
    parts, when = zip(registers, directions, numbers, keys, strict=True), int(phase)
    if go is not None and not go:
        return registers[0].new_zeros(len(registers), dtype=torch.int64)
    return torch.stack([_move(register, direction, rate, key, when) for register, direction, rate, key in parts])


def momentum_of_many(
    registers: Sequence[Tensor], row_exponents: Sequence[Tensor], group_exponents: Sequence[Tensor]
) -> list[Tensor]:
    """See `tritwise.ops.nibble.momentum_of_many`."""
    parts = zip(registers, row_exponents, group_exponents, strict=True)
    return [level_values(split_nibbles(b)[1]) * _spread(_units(row, group), b.shape[1]) for b, row, group in parts]


def _units(row_exponent: Tensor, group_exponent: Tensor) -> Tensor:
    """What a momentum of 1 means in each group: float32 [O, G], exact while it is a normal number."""
    return power_of_two(row_exponent) * scale_values(group_exponent)


def _spread(values_OG: Tensor, columns: int) -> Tensor:
    return values_OG.repeat_interleave(GROUP, dim=1)[:, :columns]


def _eighths(peak_OG: Tensor) -> Tensor:
    """The least E for which 7 units of bf16(2**(E/8)) reach the peak, as int32; very low where the peak is 0."""
    # The divisor is a tensor: CUDA multiplies by the reciprocal of a plain number, which is not the same float.
    ratio = peak_OG / torch.full_like(peak_OG, NIBBLE_LIMIT)
    fraction, octave = torch.frexp(ratio)  # 0.5 <= fraction < 1
    steps = scale_table(peak_OG.device)[120:129]  # 0.5 … 1
    eighths = octave * EXPONENTS_PER_OCTAVE - EXPONENTS_PER_OCTAVE + torch.bucketize(fraction, steps, out_int32=True)
    return eighths.masked_fill_(ratio == 0, (EXPONENT_FLOOR - 16) * EXPONENTS_PER_OCTAVE)


def _accumulate(
    register: Tensor,
    row_exponent: Tensor,
    group_exponent: Tensor,
    grad: Tensor,
    decay: float,
    key: Key,
    phase: int,
) -> Tensor:
    rows, columns = register.shape
    coarse_OI, momentum_OI = split_nibbles(register)
    # decay * unit is formed first and alone, so that a fused multiply-add cannot change the sum.
    kept_OG = _units(row_exponent, group_exponent) * decay
    value_OI = (level_values(momentum_OI) * _spread(kept_OG, columns)).add_(grad)
    value_OGK = pad(value_OI, (0, -columns % GROUP)).view(rows, -1, GROUP)
    peak_OG = torch.linalg.vector_norm(value_OGK, ord=float("inf"), dim=2)
    if not torch.isfinite(peak_OG).all():  # the norm hands a NaN on; an overflowed sum is refused too
        return torch.zeros((), dtype=torch.bool, device=register.device)
    eighths_OG = _eighths(peak_OG)
    # Rounded up to a whole octave, so that no group of the row needs more.
    row_O1 = (eighths_OG.amax(dim=1, keepdim=True) + EXPONENTS_PER_OCTAVE - 1) >> 3
    row_O1.clamp_(EXPONENT_FLOOR, EXPONENT_CEILING)
    group_OG = (eighths_OG - row_O1 * EXPONENTS_PER_OCTAVE).clamp_(-EXPONENT_LIMIT, 0)
    level_OI = (value_OI / _spread(_units(row_O1, group_OG), columns)).clamp_(-NIBBLE_LIMIT, NIBBLE_LIMIT)
    if decay < 1:
        steps_OI = nearest_level(level_OI)
    else:
        steps_OI = random_level(level_OI, weyl_bits16(register.numel(), key, phase, register.device))
    register.copy_(join_nibbles(coarse_OI, steps_OI))
    row_exponent.copy_(row_O1)
    group_exponent.copy_(group_OG)
    return torch.ones((), dtype=torch.bool, device=register.device)


def _move(register: Tensor, direction: Tensor, rate: float, key: Key, phase: int) -> Tensor:
    fixed = to_fixed_point(direction, -rate * NIBBLE_LEAD, limit=2 * NIBBLE_LIMIT)
    steps = round_stochastic(fixed, weyl_bits16(register.numel(), key, phase, register.device))
    before = leading_trit(register)
    coarse, momentum = split_nibbles(register)
    register.copy_(join_nibbles(steps.add_(coarse).clamp_(-NIBBLE_LIMIT, NIBBLE_LIMIT), momentum))
    return torch.count_nonzero(before != leading_trit(register))
