"""The oracle of the ternary linear: decode the layer's weight into a transient float tensor, then one matmul."""

import torch
from torch import Tensor

from tritwise.ops.float8 import FLOAT8
from tritwise.registers import LEAD, leading_trit, scale_values


def _spread(values_OG: Tensor, columns: int, group: int) -> Tensor:
    """Per-group values as something that broadcasts against [O, I]: [O, 1] for one group, else [O, I]."""
    if values_OG.shape[1] == 1:
        return values_OG
    return values_OG.repeat_interleave(group, dim=1)[:, :columns]


def decode(register: Tensor, exponent: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """The weight W = trit * scale as `dtype` [O, I]; exact in float32 and bfloat16."""
    # round(R / 81) is the leading trit: exact in every float type, and a third of the passes of two comparisons.
    weight_OI = register.to(dtype).mul_(1.0 / LEAD).round_()
    return weight_OI.mul_(_spread(scale_values(exponent, dtype), register.shape[1], group))


def forward(x: Tensor, register: Tensor, exponent: Tensor, group: int) -> Tensor:
    """y [..., O] = x [..., I] W^T."""
    return torch.nn.functional.linear(x, decode(register, exponent, group, x.dtype))


def input_grad(grad: Tensor, register: Tensor, exponent: Tensor, group: int) -> Tensor:
    """dL/dx [..., I] = dL/dy [..., O] W."""
    return grad @ decode(register, exponent, group, grad.dtype)


def weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """dL/dW [O, I] float32 = sum over rows of dL/dy^T x."""
    grad_NO, x_NI = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    return (grad_NO.T @ x_NI).float()


def scale_grad(weight_grad: Tensor, register: Tensor, exponent: Tensor, group: int) -> Tensor:
    """Sum of dL/dW * W over each group, float32 [O, G]."""
    product_OI = leading_trit(register) * weight_grad
    rows, columns = register.shape
    groups = exponent.shape[1]
    if groups == 1:
        sums_OG = product_OI.sum(dim=1, keepdim=True)
    else:
        padded_OI = torch.nn.functional.pad(product_OI, (0, groups * group - columns))
        sums_OG = padded_OI.view(rows, groups, group).sum(dim=2)
    return sums_OG.mul_(scale_values(exponent))


def column_grad(weight_grad: Tensor, register: Tensor, exponent: Tensor, group: int) -> Tensor:
    """Sum of dL/dW * W over each column, float32 [I]."""
    return (decode(register, exponent, group, torch.float32) * weight_grad).sum(dim=0)


def trits_float8(register: Tensor, turned: bool) -> Tensor:
    """The leading trits as float8 e4m3, which holds them exactly: [O, I], or [I, O] if `turned`."""
    trit = leading_trit(register)
    return (trit.t().contiguous() if turned else trit).to(FLOAT8)
