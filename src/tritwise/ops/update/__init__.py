"""The integer half of learning: gradients accumulate into int8 momentum, and a direction moves registers.

Both operations change their integer arguments in place and take their randomness from a key (two ints), so equal
inputs give equal bits on every backend.
"""

import torch
from torch import Tensor

from tritwise.ops import native
from tritwise.ops.backends import choose, implement
from tritwise.ops.library import define
from tritwise.ops.update import cpu, reference
from tritwise.registers import REGISTER_LIMIT, Key

implement("update", "reference", reference)
implement("update", "cpu", cpu, priority=10, devices=("cpu",), refuses=native.refuses)


def _accumulate(
    momentum: Tensor, row_exponent: Tensor, grad: Tensor, decay: float, key_first: int, key_second: int
) -> Tensor:
    module = choose("update", momentum.device)
    return module.accumulate_momentum(momentum, row_exponent, grad, decay, Key(key_first, key_second))


def _move(register: Tensor, direction: Tensor, rate: float, limit: int, key_first: int, key_second: int) -> Tensor:
    module = choose("update", register.device)
    return module.move_registers(register, direction, rate, limit, Key(key_first, key_second))


_accumulate_op = define(
    "accumulate_momentum(Tensor(a!) momentum, Tensor(b!) row_exponent, Tensor grad, float decay, "
    "int key_first, int key_second) -> Tensor",
    _accumulate,
    lambda momentum, row_exponent, grad, decay, key_first, key_second: momentum.new_empty((), dtype=torch.bool),
)
_move_op = define(
    "move_registers(Tensor(a!) register, Tensor direction, float rate, int limit, int key_first, int key_second)"
    " -> Tensor",
    _move,
    lambda register, direction, rate, limit, key_first, key_second: register.new_empty((), dtype=torch.int64),
)


def accumulate_momentum(momentum: Tensor, row_exponent: Tensor, grad: Tensor, decay: float, key: Key) -> Tensor:
    """momentum <- decay * momentum + grad, in place, stochastically rounded to int8 with a new exponent per row.

    momentum: int8 [O, I] meaning momentum * 2**row_exponent; row_exponent: int8 [O, 1]; grad: float32 [O, I].
    decay is the coefficient for the first micro-batch of a step and 1.0 for the others: that is true accumulation.
    Returns a bool 0-d tensor: True if the gradient was taken, False if a NaN or infinity came of it (nothing changed).
    """
    return _accumulate_op(momentum, row_exponent, grad, decay, key.first, key.second)


def move_registers(register: Tensor, direction: Tensor, rate: float, key: Key, limit: int = REGISTER_LIMIT) -> Tensor:
    """register <- clamp(register - round(rate * direction)), in place, stochastically rounded. Returns the flips.

    register: int8, any shape; direction: float32, same shape; rate: register units for a direction of 1 (that is
    81 * the rate in leading-trit units); limit: 121 for registers, 127 for scale exponents.
    Returns how many leading trits changed, an int64 0-d tensor.
    """
    return _move_op(register, direction, rate, limit, key.first, key.second)
