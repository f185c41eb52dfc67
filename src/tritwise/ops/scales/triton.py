"""Moving scales on a GPU: two launches for all sets of a model.

The sum of squares of a set is a sum of integers, the same in whatever order its parts arrive.
"""

import functools
import importlib
import struct
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from tritwise.ops import gpu
from tritwise.ops.scales import reference
from tritwise.registers import Key


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module("tritwise.ops.scales.kernels")


def move_scales_many(
    exponents: Sequence[Tensor],
    evidences: Sequence[Tensor],
    momenta: Sequence[Tensor],
    octaves: Sequence[float],
    keys: Sequence[Key],
    still: Tensor | None,
    go: Tensor | None,
    live_octaves: Tensor | None = None,
    live_keys: Tensor | None = None,
) -> None:
    """See `tritwise.ops.scales.move_scales_many`."""
    device = exponents[0].device
    live = tuple(None if one is None else one.contiguous() for one in (live_octaves, live_keys))
    sets = list(zip(exponents, evidences, momenta, strict=True))
    if not all(_moves(*one, device) for one in sets):
        return reference.move_scales_many(exponents, evidences, momenta, octaves, keys, still, go, *live)
    flat = [tuple(tensor.contiguous() for tensor in one) for one in sets]
    lines, programs, before = [], 0, 0
    for one, rate, key in zip(flat, octaves, keys, strict=True):
        (bits,), count = struct.unpack("q", struct.pack("d", rate)), one[0].numel()
        lines.append([programs, *key, *(tensor.data_ptr() for tensor in one), bits, count, before, 0])
        programs += -(-count // gpu.ELEMENTS)
        before += count
    tensors = len(lines)
    table = gpu.upload(lines, device)
    square_T = torch.zeros(tensors, dtype=torch.int64, device=device)
    constants = {"TENSORS": max(gpu.power_of_two_above(tensors), 16), "BLOCK": gpu.ELEMENTS}
    gpu.launch(_kernels().scale_squares, programs, device, table, square_T, tensors, **constants)
    gpu.launch(_kernels().move_scales, programs, device, table, square_T, still, go, *live, tensors, **constants)
    for changed, one in zip(flat, sets, strict=True):
        for part, original in zip(changed[:2], one[:2], strict=True):
            gpu.put_back(part, original)


def _moves(exponent: Tensor, evidence: Tensor, momentum: Tensor, device: torch.device) -> bool:
    every = exponent, evidence, momentum
    alike = all(one.dtype is torch.int8 and one.device == device for one in every)
    return alike and exponent.numel() == evidence.numel() == momentum.numel() > 0
