"""Momentum accumulation and register moves on a GPU: a few launches for all tensors, the reference's bits.

Nothing waits for the device: whether a gradient is finite is found, and heeded, there. Keys travel in a table that the
host fills at every call. A CUDA graph would replay that table, so a call that is recorded into one takes its keys and
rates from tensors on the device instead ("live").
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tritwise.ops import gpu
from tritwise.ops.update import reference
from tritwise.registers import FRACTION_BITS, Key


def accumulate_momentum(momentum: Tensor, row_exponent: Tensor, grad: Tensor, decay: float, key: Key) -> Tensor:
    """See `tritwise.ops.update.accumulate_momentum`."""
    return accumulate_momentum_many([momentum], [row_exponent], [grad], decay, [key]).view(())


def move_registers(register: Tensor, direction: Tensor, rate: float, limit: int, key: Key) -> Tensor:
    """See `tritwise.ops.update.move_registers`."""
    return move_registers_many([register], [direction], [rate], limit, [key], None).view(())


def accumulate_momentum_many(
    momenta: Sequence[Tensor],
    row_exponents: Sequence[Tensor],
    grads: Sequence[Tensor],
    decay: float,
    keys: Sequence[Key],
    live_keys: Tensor | None = None,
) -> Tensor:
    """See `tritwise.ops.update.accumulate_momentum_many`."""
    device = momenta[0].device
    parts = list(zip(momenta, row_exponents, grads, keys, strict=True))
    if not all(_accumulates(m, e, g, device) for m, e, g, _ in parts):
        one = reference.accumulate_momentum
        return reference.accumulate_each(one, momenta, row_exponents, grads, decay, keys, live_keys)
    flat = [(m.contiguous(), e.contiguous(), g.contiguous()) for m, e, g, _ in parts]
    across = min(gpu.power_of_two_above(max(m.shape[1] for m in momenta)), gpu.ELEMENTS // 4)
    down = gpu.ELEMENTS // across
    lines, programs, all_rows, aligned, bits = [], 0, 0, True, gpu.float_bits(decay)
    for (m, e, g), key in zip(flat, keys, strict=True):
        rows, columns = m.shape
        addresses = m.data_ptr(), e.data_ptr(), g.data_ptr()
        lines.append([programs, *key, *addresses, bits, rows, columns, all_rows])
        programs += -(-rows // down) * -(-columns // across)
        all_rows += rows
        aligned = aligned and not (addresses[0] | addresses[2] | columns) % 16
    tensors = len(lines)
    table = gpu.upload(lines, device)
    gpu.fill(table, live_keys)
    zeros = torch.zeros(all_rows + tensors, dtype=torch.int32, device=device)
    peak_R, refused_T = zeros[:all_rows], zeros[all_rows:]
    old_R = torch.empty(all_rows, dtype=torch.int32, device=device)
    taken_T = torch.empty(tensors, dtype=torch.bool, device=device)
    constants = {
        "TENSORS": max(gpu.power_of_two_above(tensors), 16),
        "BLOCK_R": down,
        "BLOCK_C": across,
        "ALIGNED": aligned,
    }
    run = gpu.kernels()
    gpu.launch(run.peaks, programs, device, table, peak_R, old_R, refused_T, tensors, **constants)
    out = taken_T.view(torch.int8)
    gpu.launch(run.requantise, programs, device, table, peak_R, old_R, refused_T, out, tensors, **constants)
    for (m, e, _), momentum, row_exponent in zip(flat, momenta, row_exponents, strict=True):
        gpu.put_back(m, momentum)
        gpu.put_back(e, row_exponent)
    return taken_T


def move_registers_many(
    registers: Sequence[Tensor],
    directions: Sequence[Tensor],
    rates: Sequence[float],
    limit: int,
    keys: Sequence[Key],
    go: Tensor | None,
    live_rates: Tensor | None = None,
    live_keys: Tensor | None = None,
) -> Tensor:
    """See `tritwise.ops.update.move_registers_many`."""
    device, live = registers[0].device, (live_rates, live_keys)
    if not all(gpu.can_move(r, d, device) for r, d in zip(registers, directions, strict=True)):
        return reference.move_each(reference.move_registers, registers, directions, rates, limit, keys, go, *live)
    factors = [-rate * (1 << FRACTION_BITS) for rate in rates]
    return gpu.move_all(gpu.kernels().move, registers, directions, factors, keys, go, limit, *live)


def _accumulates(momentum: Tensor, row_exponent: Tensor, grad: Tensor, device: torch.device) -> bool:
    return (
        momentum.dtype is torch.int8
        and row_exponent.dtype is torch.int8
        and grad.dtype is torch.float32
        and momentum.device == row_exponent.device == grad.device == device
        and momentum.ndim == 2
        and momentum.numel() > 0
        and grad.shape == momentum.shape
        and row_exponent.shape == (momentum.shape[0], 1)
    )
