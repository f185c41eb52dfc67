"""Nibble registers on a GPU: a launch or two for all tensors, the reference's bits.

Nothing waits for the device. A CUDA graph can hold these calls if rates and phase come as tensors; the keys stay.
"""

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from tritwise.ops import gpu
from tritwise.ops.nibble import reference
from tritwise.registers import FRACTION_BITS, NIBBLE_LEAD, WEYL_STEP, Key, scale_table, weyl_turn

LINES = gpu.ELEMENTS // reference.GROUP


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module("tritwise.ops.nibble.kernels")


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
    device = registers[0].device
    state = list(zip(registers, row_exponents, group_exponents, strict=True))
    if not all(_has_momentum(*s, device) and gpu.can_move(s[0], g, device) for s, g in zip(state, grads, strict=True)):
        lists = registers, row_exponents, group_exponents, grads
        return reference.accumulate_nibble_many(*lists, decay, keys, phase)
    flat = [tuple(tensor.contiguous() for tensor in tensors) for tensors in state]
    values = [grad.contiguous() for grad in grads]
    lines, programs, constants = _table(flat, values, keys)
    tensors, all_rows = len(flat), sum(register.shape[0] for register in registers)
    zeros = torch.zeros(all_rows + tensors, dtype=torch.int32, device=device)
    peak_R, refused_T = zeros[:all_rows], zeros[all_rows:]
    peak_L = torch.empty(programs * LINES, dtype=torch.int32, device=device)
    kept_L = torch.empty(programs * LINES, dtype=torch.float32, device=device)
    taken_T = torch.empty(tensors, dtype=torch.bool, device=device)
    shared = gpu.upload(lines, device), scale_table(device), peak_R, peak_L, kept_L, refused_T
    gpu.launch(_kernels().peaks, programs, device, *shared, gpu.float_bits(decay), tensors, **constants)
    out = taken_T.view(torch.int8)
    how = constants | {"NEAREST": decay < 1}
    gpu.launch(_kernels().requantise, programs, device, *shared, out, _turn(phase), tensors, **how)
    for changed, originals in zip(flat, state, strict=True):
        for one, original in zip(changed, originals, strict=True):
            gpu.put_back(one, original)
    return taken_T


def move_nibbles_many(
    registers: Sequence[Tensor],
    directions: Sequence[Tensor],
    rates: Sequence[float] | Tensor,
    keys: Sequence[Key],
    phase: int | Tensor,
    go: Tensor | None,
) -> Tensor:
    """See `tritwise.ops.nibble.move_nibbles_many`."""
    device = registers[0].device
    if not all(gpu.can_move(r, d, device) for r, d in zip(registers, directions, strict=True)):
        return reference.move_nibbles_many(registers, directions, rates, keys, phase, go)
    turn = _turn(phase)
    if isinstance(rates, Tensor):
        given = registers, directions, [0.0] * len(registers), keys, go
        return gpu.move_all(_kernels().move, *given, turn, live_rates=rates * NIBBLE_LEAD)
    factors = [-rate * NIBBLE_LEAD * (1 << FRACTION_BITS) for rate in rates]
    return gpu.move_all(_kernels().move, registers, directions, factors, keys, go, turn)


def momentum_of_many(
    registers: Sequence[Tensor], row_exponents: Sequence[Tensor], group_exponents: Sequence[Tensor]
) -> list[Tensor]:
    """See `tritwise.ops.nibble.momentum_of_many`."""
    device = registers[0].device
    state = list(zip(registers, row_exponents, group_exponents, strict=True))
    if not all(_has_momentum(*tensors, device) for tensors in state):
        return reference.momentum_of_many(registers, row_exponents, group_exponents)
    flat = [tuple(tensor.contiguous() for tensor in tensors) for tensors in state]
    values = [torch.empty(register.shape, dtype=torch.float32, device=device) for register in registers]
    lines, programs, constants = _table(flat, values, [Key(0, 0)] * len(flat))
    table = gpu.upload(lines, device)
    gpu.launch(_kernels().momentum_of, programs, device, table, scale_table(device), len(flat), **constants)
    return values


def _turn(phase: int | Tensor) -> int | Tensor:
    return phase * WEYL_STEP & 0xFFFF if isinstance(phase, Tensor) else weyl_turn(phase)


def _table(
    state: Sequence[tuple[Tensor, ...]], values: Sequence[Tensor], keys: Sequence[Key]
) -> tuple[list[list[int]], int, dict[str, int | bool]]:
    """The table's lines for contiguous (register, row exponent, group exponent) and the gradients or what is written;
    the number of programs; and what a kernel is compiled for."""
    lines, programs, all_rows, aligned = [], 0, 0, True
    for (register, row, group), value, key in zip(state, values, keys, strict=True):
        rows, columns = register.shape
        addresses = register.data_ptr(), row.data_ptr(), value.data_ptr(), group.data_ptr()
        lines.append([programs, *key, *addresses, rows, columns, all_rows])
        programs += -(-rows * -(-columns // reference.GROUP) // LINES)
        all_rows += rows
        aligned = aligned and not (addresses[0] | addresses[2] | columns) % 16
    constants = {"TENSORS": max(gpu.power_of_two_above(len(lines)), 16), "BLOCK": LINES, "ALIGNED": aligned}
    return lines, programs, constants


def _has_momentum(register: Tensor, row_exponent: Tensor, group_exponent: Tensor, device: torch.device) -> bool:
    return (
        register.ndim == 2
        and row_exponent.device == device
        and row_exponent.dtype is torch.int8
        and row_exponent.shape == (register.shape[0], 1)
        and register.device == device
        and gpu.is_served(register, group_exponent, reference.GROUP)
    )
