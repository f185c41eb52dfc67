"""One byte a weight: the register and its momentum share it (`tritwise.registers.nibble`).

A register is int8 [O, I] with b = 16*r + m. Momentum m means ±MOMENTUM_LEVELS[|m|] * 2**P * 2**(E/8): P is an int8
exponent of its row, [O, 1], and E <= 0 an int8 exponent of its group of 32 columns, [O, ceil(I / 32)]; so a weight
takes 1 + 1/32 + 1/I bytes, however small the gradients are. New state is P = EXPONENT_FLOOR, E = 0 and m = 0.

Momentum is rounded to the nearest level: a batch's gradient differs from the last one's by more than a level, and so
evens out what rounding at random would, at half the error. Micro-batches after the first bring less, and are rounded at
random. With so few steps of r nearly everything that is learnt lives in its rounding, so that must be even over the
steps: bits come from `weyl_bits16`, from a key that stays and a phase that counts the calls. As everywhere, equal
inputs give equal bits on every backend. The `_many` forms do a list of tensors: on a GPU in one launch or two.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tritwise.ops import gpu
from tritwise.ops.backends import choose, implement
from tritwise.ops.library import define, flat_keys, keys_of
from tritwise.ops.nibble import reference, triton
from tritwise.ops.nibble.reference import EXPONENT_FLOOR, GROUP
from tritwise.registers import Key

__all__ = [
    "EXPONENT_FLOOR",
    "GROUP",
    "accumulate_nibble",
    "accumulate_nibble_many",
    "momentum_of",
    "momentum_of_many",
    "move_nibbles",
    "move_nibbles_many",
]

implement("nibble", "reference", reference)
implement("nibble", "triton", triton, priority=20, devices=("cuda",), refuses=gpu.refuses)


def _accumulate(
    registers: list[Tensor],
    row_exponents: list[Tensor],
    group_exponents: list[Tensor],
    grads: list[Tensor],
    decay: float,
    keys: list[int],
    phase: int,
    live_phase: Tensor | None = None,
) -> Tensor:
    run = choose("nibble", registers[0].device).accumulate_nibble_many
    when = phase if live_phase is None else live_phase
    return run(registers, row_exponents, group_exponents, grads, decay, keys_of(keys), when)


def _move(
    registers: list[Tensor],
    directions: list[Tensor],
    rates: list[float],
    keys: list[int],
    phase: int,
    go: Tensor | None,
    live_rates: Tensor | None = None,
    live_phase: Tensor | None = None,
) -> Tensor:
    run = choose("nibble", registers[0].device).move_nibbles_many
    when = phase if live_phase is None else live_phase
    return run(registers, directions, rates if live_rates is None else live_rates, keys_of(keys), when, go)


def _momentum_of(registers: list[Tensor], row_exponents: list[Tensor], group_exponents: list[Tensor]) -> list[Tensor]:
    return choose("nibble", registers[0].device).momentum_of_many(registers, row_exponents, group_exponents)


_accumulate_op = define(
    "accumulate_nibble_many(Tensor(a!)[] registers, Tensor(b!)[] row_exponents, Tensor(c!)[] group_exponents, "
    "Tensor[] grads, float decay, int[] keys, int phase, Tensor? live_phase=None) -> Tensor",
    _accumulate,
    lambda registers, *_: registers[0].new_empty(len(registers), dtype=torch.bool),
)
_move_op = define(
    "move_nibbles_many(Tensor(a!)[] registers, Tensor[] directions, float[] rates, int[] keys, int phase, Tensor? go, "
    "Tensor? live_rates=None, Tensor? live_phase=None) -> Tensor",
    _move,
    lambda registers, *_: registers[0].new_empty(len(registers), dtype=torch.int64),
)
_momentum_op = define(
    "momentum_of_many(Tensor[] registers, Tensor[] row_exponents, Tensor[] group_exponents) -> Tensor[]",
    _momentum_of,
    lambda registers, *_: [register.new_empty(register.shape, dtype=torch.float32) for register in registers],
)


def accumulate_nibble_many(
    registers: Sequence[Tensor],
    row_exponents: Sequence[Tensor],
    group_exponents: Sequence[Tensor],
    grads: Sequence[Tensor],
    decay: float,
    keys: Sequence[Key],
    phase: int | Tensor,
) -> Tensor:
    """momentum <- decay * momentum + grad, in place, for each of several tensors on one device (at least one).

    registers, row_exponents, group_exponents: int8 as above, r stays; grads: float32 [O, I]. Units are the smallest
    that hold the largest element of their group. decay is the coefficient for the first micro-batch of a step and 1.0
    for the others. Below 1 m becomes the nearest level; at 1 it is rounded with `weyl_bits16(…, key, phase)`: a key of
    its own for each tensor, without the step, and a phase that counts the accumulations (micro-batches included), or an
    int64 0-d tensor on the device, where only that knows it: in a CUDA graph.
    Returns bool [tensors]: False where a NaN or infinity came of it. Such a tensor and its exponents do not change; the
    others do.
    """
    lists = list(registers), list(row_exponents), list(group_exponents), list(grads)
    return _accumulate_op(*lists, decay, flat_keys(keys), *_known(phase))


def move_nibbles_many(
    registers: Sequence[Tensor],
    directions: Sequence[Tensor],
    rates: Sequence[float] | Tensor,
    keys: Sequence[Key],
    phase: int | Tensor,
    go: Tensor | None = None,
) -> Tensor:
    """r <- clamp(r - round(rate * 5 * direction), +-7), in place, for each of several tensors; m stays.

    directions: float32 of the registers' shapes; rates: in leading-trit units for a direction of 1. The roundings use
    `weyl_bits16(…, key, phase)`: other keys than the accumulations, and a phase that counts the moves. Rates and phase
    may be tensors on the device, float64 [tensors] and int64 0-d, as above.
    go: a bool 0-d tensor on the device, or None. Where it is False nothing moves, and a GPU's host need not know.
    Returns how many leading trits changed, int64 [tensors].
    """
    known, live = _known(phase)
    live_rates = rates if isinstance(rates, Tensor) else None
    numbers = [0.0] * len(registers) if isinstance(rates, Tensor) else list(rates)
    return _move_op(list(registers), list(directions), numbers, flat_keys(keys), known, go, live_rates, live)


def momentum_of_many(
    registers: Sequence[Tensor], row_exponents: Sequence[Tensor], group_exponents: Sequence[Tensor]
) -> list[Tensor]:
    """What the momentum nibbles of each of several tensors stand for: a new float32 [O, I] each, exact."""
    return _momentum_op(list(registers), list(row_exponents), list(group_exponents))


def accumulate_nibble(
    register: Tensor,
    row_exponent: Tensor,
    group_exponent: Tensor,
    grad: Tensor,
    decay: float,
    key: Key,
    phase: int,
) -> Tensor:
    """`accumulate_nibble_many` of one tensor; returns a bool 0-d tensor."""
    return accumulate_nibble_many([register], [row_exponent], [group_exponent], [grad], decay, [key], phase)[0]


def move_nibbles(
    register: Tensor, direction: Tensor, rate: float, key: Key, phase: int, go: Tensor | None = None
) -> Tensor:
    """`move_nibbles_many` of one tensor; returns the flips, an int64 0-d tensor."""
    return move_nibbles_many([register], [direction], [rate], [key], phase, go)[0]


def momentum_of(register: Tensor, row_exponent: Tensor, group_exponent: Tensor) -> Tensor:
    """`momentum_of_many` of one tensor: its level * 2**P * 2**(E/8) as float32 [O, I]."""
    return momentum_of_many([register], [row_exponent], [group_exponent])[0]


def _known(phase: int | Tensor) -> tuple[int, Tensor | None]:
    """A phase as a schema takes it: an int (0 where only the device knows), and the tensor or None."""
    return (0, phase) if isinstance(phase, Tensor) else (phase, None)
