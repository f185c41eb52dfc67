"""The integer half of learning: gradients accumulate into int8 momentum, and a direction moves registers.

Both operations change their integer arguments in place and take their randomness from a key (two ints), so equal
inputs give equal bits on every backend. The `_many` forms do a list of tensors in one call, with the same bits: on a
GPU that is a few launches for a whole model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tritwise.ops import gpu, native
from tritwise.ops.backends import choose, implement
from tritwise.ops.library import define, flat_keys, keys_of
from tritwise.ops.update import cpu, reference, triton
from tritwise.registers import REGISTER_LIMIT, Key

implement("update", "reference", reference)
implement("update", "cpu", cpu, priority=10, devices=("cpu",), refuses=native.refuses)
implement("update", "triton", triton, priority=20, devices=("cuda",), refuses=gpu.refuses)


def _accumulate(
    momentum: Tensor, row_exponent: Tensor, grad: Tensor, decay: float, key_first: int, key_second: int
) -> Tensor:
    module = choose("update", momentum.device)
    return module.accumulate_momentum(momentum, row_exponent, grad, decay, Key(key_first, key_second))


def _move(register: Tensor, direction: Tensor, rate: float, limit: int, key_first: int, key_second: int) -> Tensor:
    module = choose("update", register.device)
    return module.move_registers(register, direction, rate, limit, Key(key_first, key_second))


def _accumulate_many(
    momenta: list[Tensor],
    row_exponents: list[Tensor],
    grads: list[Tensor],
    decay: float,
    keys: list[int],
    live_keys: Tensor | None = None,
) -> Tensor:
    module, pairs = choose("update", momenta[0].device), keys_of(keys)
    if hasattr(module, "accumulate_momentum_many"):
        return module.accumulate_momentum_many(momenta, row_exponents, grads, decay, pairs, live_keys)
    return reference.accumulate_each(module.accumulate_momentum, momenta, row_exponents, grads, decay, pairs, live_keys)


def _move_many(
    registers: list[Tensor],
    directions: list[Tensor],
    rates: list[float],
    limit: int,
    keys: list[int],
    go: Tensor | None,
    live_rates: Tensor | None = None,
    live_keys: Tensor | None = None,
) -> Tensor:
    module, pairs, live = choose("update", registers[0].device), keys_of(keys), (live_rates, live_keys)
    if hasattr(module, "move_registers_many"):
        return module.move_registers_many(registers, directions, rates, limit, pairs, go, *live)
    return reference.move_each(module.move_registers, registers, directions, rates, limit, pairs, go, *live)


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
_accumulate_many_op = define(
    "accumulate_momentum_many(Tensor(a!)[] momenta, Tensor(b!)[] row_exponents, Tensor[] grads, float decay, "
    "int[] keys, Tensor? live_keys=None) -> Tensor",
    _accumulate_many,
    lambda momenta, row_exponents, grads, decay, keys, live_keys=None: momenta[0].new_empty(
        len(momenta), dtype=torch.bool
    ),
)
_move_many_op = define(
    "move_registers_many(Tensor(a!)[] registers, Tensor[] directions, float[] rates, int limit, int[] keys, Tensor? go,"
    " Tensor? live_rates=None, Tensor? live_keys=None) -> Tensor",
    _move_many,
    lambda registers, directions, rates, limit, keys, go, live_rates=None, live_keys=None: registers[0].new_empty(
        len(registers), dtype=torch.int64
    ),
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


def accumulate_momentum_many(
    momenta: Sequence[Tensor],
    row_exponents: Sequence[Tensor],
    grads: Sequence[Tensor],
    decay: float,
    keys: Sequence[Key] | Tensor,
) -> Tensor:
    """`accumulate_momentum` of each of several tensors on one device (at least one), each with its own key.

    keys: or int64 [tensors, 2] on the device, where only that knows them: in a CUDA graph.
    Returns bool [tensors]: which were taken. One that refuses does not keep the others from being changed.
    """
    known, live = _known(keys, len(momenta))
    return _accumulate_many_op(list(momenta), list(row_exponents), list(grads), decay, known, live)


def move_registers_many(
    registers: Sequence[Tensor],
    directions: Sequence[Tensor],
    rates: Sequence[float] | Tensor,
    keys: Sequence[Key] | Tensor,
    limit: int = REGISTER_LIMIT,
    go: Tensor | None = None,
) -> Tensor:
    """`move_registers` of each of several tensors on one device (at least one), each with its own rate and key.

    rates, keys: or tensors on the device, float64 [tensors] and int64 [tensors, 2], as in `accumulate_momentum_many`.
    go: a bool 0-d tensor on the device, or None. Where it is False nothing moves, and a GPU's host need not know.
    Returns the flips, int64 [tensors].
    """
    known, live = _known(keys, len(registers))
    live_rates = rates if isinstance(rates, Tensor) else None
    numbers = [0.0] * len(registers) if isinstance(rates, Tensor) else list(rates)
    return _move_many_op(list(registers), list(directions), numbers, limit, known, go, live_rates, live)


def _known(keys: Sequence[Key] | Tensor, count: int) -> tuple[list[int], Tensor | None]:
    """Keys as a schema takes them: ints (zeros where only the device knows), and the tensor or None."""
    return ([0] * (2 * count), keys) if isinstance(keys, Tensor) else (flat_keys(keys), None)
