"""Message passing on a GPU: one pass that gathers and adds, so no message is ever written down; fixed bits.

Edges are sorted by their targets, and a program adds up a row in that order: no atomics, the same sum every time.
"""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from tritwise.ops import gpu
from tritwise.ops.graph import reference


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module("tritwise.ops.graph.kernels")


def edge_sum(x: Tensor, source: Tensor, target: Tensor, rows: int) -> Tensor:
    """See `tritwise.ops.graph.edge_sum`."""
    if x.dtype not in gpu.FLOATS or not x.numel() or not rows:
        return reference.edge_sum(x, source, target, rows)
    sorted_E, order_E = torch.sort(target, stable=True)
    first_R = torch.searchsorted(sorted_E, torch.arange(rows + 1, device=x.device, dtype=sorted_E.dtype))
    values, out = x.contiguous(), x.new_empty(rows, x.shape[1])
    _launch(_kernels().edge_sum, rows, values, source[order_E].contiguous(), first_R, out)
    return out


def gather_add(base: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """See `tritwise.ops.graph.gather_add`."""
    if x.dtype not in gpu.FLOATS or base.dtype not in gpu.FLOATS or not x.numel() or not base.numel():
        return reference.gather_add(base, x, index)
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    _launch(_kernels().gather_add, len(base), base.contiguous(), x.contiguous(), index.contiguous(), out, rows_x=len(x))
    return out


def _launch(kernel: object, rows: int, *tensors: Tensor, rows_x: int = 0) -> None:
    columns = tensors[-1].shape[1]
    block = min(gpu.power_of_two_above(columns), 1024)
    programs = rows * -(-columns // block)
    gpu.launch(kernel, programs, tensors[0].device, *tensors, columns, rows_x or len(tensors[0]), BLOCK=block)
