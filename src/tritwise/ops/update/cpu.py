"""Momentum accumulation and register moves on a CPU, in C: one pass over the data, the reference's bits."""

import torch
from torch import Tensor

from tritwise.ops.native import kernels
from tritwise.ops.update import reference
from tritwise.registers import FRACTION_BITS, Key


def accumulate_momentum(momentum: Tensor, row_exponent: Tensor, grad: Tensor, decay: float, key: Key) -> Tensor:
    """See `tritwise.ops.update.accumulate_momentum`."""
    served = (
        momentum.dtype is torch.int8
        and row_exponent.dtype is torch.int8
        and grad.dtype is torch.float32
        and row_exponent.is_cpu
        and grad.is_cpu
        and grad.shape == momentum.shape
        and row_exponent.shape == (momentum.shape[0], 1)
        and momentum.ndim == 2
        and momentum.numel() > 0
    )
    taken = -1
    if served:
        m, e, g = momentum.contiguous(), row_exponent.contiguous(), grad.contiguous()
        rows, columns = m.shape
        taken = kernels().accumulate(m.data_ptr(), e.data_ptr(), g.data_ptr(), rows, columns, decay, *key)
        if taken and m is not momentum:
            momentum.copy_(m)
        if taken and e is not row_exponent:
            row_exponent.copy_(e)
    if taken < 0:
        return reference.accumulate_momentum(momentum, row_exponent, grad, decay, key)
    return torch.full((), taken == 1)


def move_registers(register: Tensor, direction: Tensor, rate: float, limit: int, key: Key) -> Tensor:
    """See `tritwise.ops.update.move_registers`."""
    served = (
        register.dtype is torch.int8
        and direction.dtype is torch.float32
        and direction.is_cpu
        and direction.shape == register.shape
    )
    if not served:
        return reference.move_registers(register, direction, rate, limit, key)
    r, d = register.contiguous(), direction.contiguous()
    factor = -rate * (1 << FRACTION_BITS)
    flips = kernels().move(r.data_ptr(), d.data_ptr(), r.numel(), factor, limit, *key)
    if r is not register:
        register.copy_(r)
    return torch.tensor(flips)
