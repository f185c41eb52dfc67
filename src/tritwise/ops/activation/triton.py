"""The squared ReLU with a norm on a GPU: a program holds a row, which is read once and written once."""

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from tritwise.ops import gpu
from tritwise.ops.activation import reference
from tritwise.ops.float8 import FLOAT8

WIDEST = 16384  # columns of a row that the registers of a program hold


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module("tritwise.ops.activation.kernels")


def _is_served(h: Tensor) -> bool:
    return h.dtype in gpu.FLOATS and h.numel() > 0 and h.shape[-1] <= WIDEST


def forward(h: Tensor, scale: Tensor | None, leak: float, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `tritwise.ops.activation.relu_squared_norm`."""
    if not _is_served(h):
        return reference.forward(h, scale, leak, factor)
    h = h.contiguous()
    y, inverse = torch.empty_like(h), h.new_empty(h.shape[:-1], dtype=torch.float32)
    low = h.new_empty(h.shape if factor else 0, dtype=FLOAT8)
    _launch(_kernels().relu_squared_norm, h, (h, scale, y, low if factor else None, inverse), leak, factor)
    return y, inverse, low


def backward(grad: Tensor, h: Tensor, inverse: Tensor, scale: Tensor | None, leak: float) -> Tensor:
    """dL/dh of h's dtype."""
    if not _is_served(h) or grad.dtype not in gpu.FLOATS:
        return reference.backward(grad, h, inverse, scale, leak)
    h, grad = h.contiguous(), grad.contiguous()
    h_grad = torch.empty_like(h)
    _launch(_kernels().relu_squared_norm_grad, h, (grad, h, inverse, scale, h_grad), leak)
    return h_grad


def _launch(kernel: object, h: Tensor, tensors: Sequence[Tensor | None], *numbers: float) -> None:
    columns = h.shape[-1]
    block = gpu.power_of_two_above(columns)
    given = (None if t is None else t.contiguous() for t in tensors)
    warps = gpu.warps_for(block)
    gpu.launch(kernel, h.numel() // columns, h.device, *given, columns, *numbers, BLOCK=block, num_warps=warps)
