"""The ternary linear on a CPU: the weight is decoded in C, in one pass, and torch multiplies. The reference's bits."""

import torch
from torch import Tensor

from tritwise.ops.linear import reference
from tritwise.ops.native import kernels
from tritwise.registers import LEAD, scale_table

CPU = torch.device("cpu")


def is_served(register: Tensor, exponent: Tensor, group: int) -> bool:
    """Whether C can decode these: int8 [O, I] and int8 [O, ceil(I / group)] on the CPU. The reference does the rest."""
    return (
        register.dtype is torch.int8
        and exponent.dtype is torch.int8
        and register.is_cpu
        and exponent.is_cpu
        and exponent.shape == (register.shape[0], -(-register.shape[1] // group))
    )


def decode(register: Tensor, exponent: Tensor, group: int, dtype: torch.dtype, lead: int = LEAD) -> Tensor:
    """The weight W = round(R / lead) * scale as `dtype` [O, I], with the reference's bits."""
    if dtype is not torch.float32 or not is_served(register, exponent, group):
        return reference.decode(register, exponent, group, dtype, lead)
    r, e, scales = register.contiguous(), exponent.contiguous(), scale_table(CPU)
    rows, columns = r.shape
    weight_OI = torch.empty(rows, columns, dtype=torch.float32, device=CPU)
    places = r.data_ptr(), e.data_ptr(), scales.data_ptr(), weight_OI.data_ptr()
    kernels().decode(*places, rows, columns, group, lead)
    return weight_OI


def forward(x: Tensor, register: Tensor, exponent: Tensor, group: int, lead: int = LEAD) -> Tensor:
    """y [..., O] = x [..., I] W^T."""
    return torch.nn.functional.linear(x, decode(register, exponent, group, x.dtype, lead))


def input_grad(grad: Tensor, register: Tensor, exponent: Tensor, group: int, lead: int = LEAD) -> Tensor:
    """dL/dx [..., I] = dL/dy [..., O] W."""
    return grad @ decode(register, exponent, group, grad.dtype, lead)


weight_grad = reference.weight_grad
scale_grad = reference.scale_grad
trits_float8 = reference.trits_float8


def column_grad(weight_grad: Tensor, register: Tensor, exponent: Tensor, group: int, lead: int = LEAD) -> Tensor:
    """Sum of dL/dW * W over each column, float32 [I]."""
    return decode(register, exponent, group, torch.float32, lead).mul_(weight_grad).sum(dim=0)
