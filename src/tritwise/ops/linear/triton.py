"""The ternary linear on a GPU: a kernel decodes the weight in one pass, and torch's matrix library multiplies."""

import torch
from torch import Tensor

from tritwise.ops import gpu
from tritwise.ops.linear import reference
from tritwise.registers import scale_table

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = 64  # rows and columns that one program turns
STRIP = 128  # rows that one program sums up for the gradients of columns


def decode(register: Tensor, exponent: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """The weight W = trit * scale as `dtype` [O, I]; exact in float32 and bfloat16."""
    if dtype not in DTYPES or not gpu.is_served(register, exponent, group):
        return reference.decode(register, exponent, group, dtype)
    return gpu.decode(register, exponent, group, dtype)


def forward(x: Tensor, register: Tensor, exponent: Tensor, group: int) -> Tensor:
    """y [..., O] = x [..., I] W^T."""
    return torch.nn.functional.linear(x, decode(register, exponent, group, x.dtype))


def input_grad(grad: Tensor, register: Tensor, exponent: Tensor, group: int) -> Tensor:
    """dL/dx [..., I] = dL/dy [..., O] W."""
    return grad @ decode(register, exponent, group, grad.dtype)


def weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """dL/dW [O, I] float32 = sum over rows of dL/dy^T x, kept in the float32 that the matrix units sum in."""
    if grad.is_cuda and grad.dtype in (torch.bfloat16, torch.float16):  # pragma: no cover - on a GPU only
        grad_NO, x_NI = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        return torch.mm(grad_NO.T, x_NI, out_dtype=torch.float32)
    return reference.weight_grad(grad, x)


def scale_grad(weight_grad: Tensor, register: Tensor, exponent: Tensor, group: int) -> Tensor:
    """Sum of dL/dW * W over each group, float32 [O, G]."""
    served = weight_grad.dtype is torch.float32 and weight_grad.shape == register.shape
    if not served or not gpu.is_served(register, exponent, group):
        return reference.scale_grad(weight_grad, register, exponent, group)
    g, r, e = weight_grad.contiguous(), register.contiguous(), exponent.contiguous()
    rows, columns = r.shape
    groups = e.shape[1]
    out_OG = torch.empty(rows, groups, dtype=torch.float32, device=r.device)
    span = min(group, columns)
    block = min(gpu.power_of_two_above(span), 1024)
    block_rows = max(1, 2048 // block)
    gpu.launch(
        gpu.kernels().scale_grad,
        -(-rows // block_rows) * groups,
        r.device,
        *(g, r, e, scale_table(r.device), out_OG, rows, columns, groups, group),
        SPAN=span,
        BLOCK_R=block_rows,
        BLOCK_C=block,
    )
    return out_OG


def column_grad(weight_grad: Tensor, register: Tensor, exponent: Tensor, group: int) -> Tensor:
    """Sum of dL/dW * W over each column, float32 [I]."""
    served = weight_grad.dtype is torch.float32 and weight_grad.shape == register.shape
    if not served or not gpu.is_served(register, exponent, group):
        return reference.column_grad(weight_grad, register, exponent, group)
    g, r, e = weight_grad.contiguous(), register.contiguous(), exponent.contiguous()
    rows, columns = r.shape
    strips = -(-rows // STRIP)
    part_SI = torch.empty(strips, columns, dtype=torch.float32, device=r.device)
    block = min(gpu.power_of_two_above(columns), 128)
    gpu.launch(
        gpu.kernels().column_grad,
        -(-columns // block) * strips,
        r.device,
        *(g, r, e, scale_table(r.device), part_SI, rows, columns, e.shape[1], group),
        STRIP=STRIP,
        BLOCK_R=16,
        BLOCK_C=block,
    )
    return part_SI.sum(dim=0)


def trits_float8(register: Tensor, turned: bool) -> Tensor:
    """The leading trits as float8 e4m3: [O, I], or [I, O] if `turned`."""
    if register.dtype is not torch.int8 or register.numel() == 0:
        return reference.trits_float8(register, turned)
    rows, columns = register.shape
    out = torch.empty((columns, rows) if turned else (rows, columns), dtype=reference.FLOAT8, device=register.device)
    gpu.launch(
        gpu.kernels().trits_float8,
        -(-rows // TILE) * -(-columns // TILE),
        register.device,
        *(register.contiguous(), out.view(torch.uint8), rows, columns),
        TURNED=turned,
        BLOCK=TILE,
    )
    return out
