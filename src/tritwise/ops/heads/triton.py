"""Queries and keys on a GPU: a program holds all heads of a position, which are read once and written once."""

import functools
import importlib
from collections.abc import Iterable
from types import ModuleType

import torch
from torch import Tensor

from tritwise.ops import gpu
from tritwise.ops.heads import reference

MOST = 16384  # numbers of a position that the registers of a program hold


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module("tritwise.ops.heads.kernels")


def _blocks(heads: int, size: int) -> tuple[int, int]:
    return gpu.power_of_two_above(heads), gpu.power_of_two_above(size // 2)


def _is_served(parts: Tensor, cos: Tensor, sin: Tensor, heads: int) -> bool:
    rows, half = _blocks(parts.shape[2], parts.shape[3])
    known = parts.dtype in gpu.FLOATS and cos.dtype == sin.dtype == torch.float32
    return known and parts.numel() > 0 and heads > 0 and 2 * rows * half <= MOST


def forward(parts: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """See `tritwise.ops.heads.turned_heads`."""
    if not _is_served(parts, cos, sin, heads):
        return reference.forward(parts, cos, sin, heads)
    parts = parts.contiguous()
    batch, time, every, size = parts.shape
    q, k = (parts.new_empty(batch, time, count, size) for count in (heads, (every - heads) // 2))
    _launch(_kernels().turned_heads, heads, parts, parts, cos.contiguous(), sin.contiguous(), q, k)
    return q, k


def backward(q_grad: Tensor, k_grad: Tensor, v_grad: Tensor, parts: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """dL/dparts of parts' dtype."""
    heads, keys = q_grad.shape[2], k_grad.shape[2]
    grads = q_grad, k_grad, v_grad
    if not _is_served(parts, cos, sin, heads) or any(grad.dtype not in gpu.FLOATS for grad in grads):
        return reference.backward(*grads, parts, cos, sin)
    parts = parts.contiguous()
    # As attention gives them: heads before positions, or as they were.
    grads = tuple(grad if grad.stride(3) == 1 else grad.contiguous() for grad in grads)
    strides = (stride for grad in grads for stride in grad.stride()[:3])
    out, values = torch.empty_like(parts), gpu.power_of_two_above(keys)
    given = *grads, parts, cos.contiguous(), sin.contiguous(), out
    _launch(_kernels().turned_heads_grad, heads, parts, *given, strides=strides, VALUES=values)
    return out


def _takes_own(y: Tensor, v: Tensor, scale: Tensor | None) -> bool:
    # Heads that share a value would add up their gradients.
    known = y.dtype in gpu.FLOATS and v.dtype in gpu.FLOATS and y.shape == v.shape and y.numel() > 0
    tile = gpu.power_of_two_above(y.shape[2]) * gpu.power_of_two_above(y.shape[3])
    return known and tile <= MOST and (scale is None or scale.dtype in gpu.FLOATS)


def without_own(y: Tensor, v: Tensor, scale: Tensor | None) -> Tensor:
    """See `tritwise.ops.heads.without_own`."""
    if not _takes_own(y, v, scale):
        return reference.without_own(y, v, scale)
    out = y.new_empty(*y.shape[:2], y.shape[2] * y.shape[3])
    _launch_own(_kernels().without_own, (), y, v, scale, out)
    return out


def without_own_grad(grad: Tensor, y: Tensor, v: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """dL/dy and dL/dv, contiguous."""
    if not _takes_own(y, v, scale) or grad.dtype not in gpu.FLOATS:
        return reference.without_own_grad(grad, y, v, scale)
    y_grad, v_grad = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (y, v))
    _launch_own(_kernels().without_own_grad, (grad.contiguous(),), y, v, scale, y_grad, v_grad)
    return y_grad, v_grad


def _launch_own(
    kernel: object, grads: tuple[Tensor, ...], y: Tensor, v: Tensor, scale: Tensor | None, *out: Tensor
) -> None:
    y, v = (t if t.stride(3) == 1 else t.contiguous() for t in (y, v))
    batch, time, heads, size = y.shape
    rows, columns = gpu.power_of_two_above(heads), gpu.power_of_two_above(size)
    given = *grads, y, v, None if scale is None else scale.contiguous(), *out
    numbers = time, heads, size, *y.stride()[:3], *v.stride()[:3]
    constants = {"ROWS": rows, "SIZE": columns, "num_warps": gpu.warps_for(rows * columns)}
    gpu.launch(kernel, batch * time, y.device, *given, *numbers, **constants)


def _launch(
    kernel: object, heads: int, parts: Tensor, *tensors: Tensor, strides: Iterable[int] = (), **constants: int
) -> None:
    batch, time, every, size = parts.shape
    keys = (every - heads) // 2
    rows, half = _blocks(heads + keys, size)
    constants |= {"ROWS": rows, "HALF": half, "num_warps": gpu.warps_for(2 * rows * half)}
    gpu.launch(kernel, batch * time, parts.device, *tensors, time, heads, keys, size // 2, *strides, **constants)
