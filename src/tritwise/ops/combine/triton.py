"""The combination of experts on a GPU: one pass forward, one pass backward, fixed bits."""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from tritwise.ops import gpu
from tritwise.ops.combine import reference


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module("tritwise.ops.combine.kernels")


def _is_served(x: Tensor, gate: Tensor, slot: Tensor) -> bool:
    return x.dtype in gpu.FLOATS and gate.dtype in gpu.FLOATS and x.numel() > 0 and slot.numel() > 0


def forward(x: Tensor, slot: Tensor, gate: Tensor) -> Tensor:
    """See `tritwise.ops.combine.combine`."""
    if not _is_served(x, gate, slot):
        return reference.forward(x, slot, gate)
    (rows, k), columns = slot.shape, x.shape[1]
    out_NC, block = x.new_empty(rows, columns), min(gpu.power_of_two_above(columns), 1024)
    tensors = x.contiguous(), slot.contiguous(), gate.contiguous(), out_NC
    gpu.launch(_kernels().forward, rows * -(-columns // block), x.device, *tensors, columns, K=k, BLOCK=block)
    return out_NC


def backward(grad: Tensor, x: Tensor, slot: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dx [S, C] of x's dtype, and dL/dgate [N, K] of the gates'."""
    if not _is_served(x, gate, slot) or grad.dtype not in gpu.FLOATS:
        return reference.backward(grad, x, slot, gate)
    (rows, k), columns = slot.shape, x.shape[1]
    x_grad_SC = torch.zeros_like(x, memory_format=torch.contiguous_format)
    gate_grad_NK = torch.empty_like(gate, memory_format=torch.contiguous_format)
    block = min(gpu.power_of_two_above(columns), 1024)
    span = -(-columns // block) * block
    tensors = grad.contiguous(), x.contiguous(), slot.contiguous(), gate.contiguous(), x_grad_SC, gate_grad_NK
    gpu.launch(_kernels().backward, rows, x.device, *tensors, columns, K=k, SPAN=span, BLOCK=block)
    return x_grad_SC, gate_grad_NK
