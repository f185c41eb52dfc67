"""The oracle of the ternary linear: decode the layer's weight into a transient float tensor, then one matmul."""

import torch
from torch import Tensor

from tritwise.ops.float8 import FLOAT8
from tritwise.registers import LEAD, leading_number, leading_trit, scale_values


def _spread(values_OG: Tensor, columns: int, group: int) -> Tensor:
    """Per-group values as something that broadcasts against [O, I]: [O, 1] for one group, else [O, I]."""
    if values_OG.shape[1] == 1:
        return values_OG
    return values_OG.repeat_interleave(group, dim=1)[:, :columns]


def decode(register: Tensor, exponent: Tensor, group: int, dtype: torch.dtype, lead: int = LEAD) -> Tensor:
    """The weight W = round(R / lead) * scale as `dtype` [O, I]. Exact in float32; in bfloat16 exact for one trit, and
    else rounded once."""
    # round(R / 81) is the leading trit: exact in every float type, and a third of the passes of two comparisons.
    wide = dtype if lead == LEAD else torch.float32
    weight_OI = register.to(wide).mul_(1.0 / lead).round_()
    return weight_OI.mul_(_spread(scale_values(exponent, wide), register.shape[1], group)).to(dtype)


def forward(x: Tensor, register: Tensor, exponent: Tensor, group: int, lead: int = LEAD) -> Tensor:
    """y [..., O] = x [..., I] W^T."""
    return torch.nn.functional.linear(x, decode(register, exponent, group, x.dtype, lead))


def input_grad(grad: Tensor, register: Tensor, exponent: Tensor, group: int, lead: int = LEAD) -> Tensor:
    """dL/dx [..., I] = dL/dy [..., O] W."""
    return grad @ decode(register, exponent, group, grad.dtype, lead)


def weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """dL/dW [O, I] float32 = sum over rows of dL/dy^T x."""
    grad_NO, x_NI = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    return (grad_NO.T @ x_NI).float()


def scale_grad(weight_grad: Tensor, register: Tensor, exponent: Tensor, group: int, lead: int = LEAD) -> Tensor:
    """Sum of dL/dW * W over each group, float32 [O, G]."""
    product_OI = leading_number(register, lead) * weight_grad
    rows, columns = register.shape
    groups = exponent.shape[1]
    if groups == 1:
        sums_OG = product_OI.sum(dim=1, keepdim=True)
    else:
        padded_OI = torch.nn.functional.pad(product_OI, (0, groups * group - columns))
        sums_OG = padded_OI.view(rows, groups, group).sum(dim=2)
    return sums_OG.mul_(scale_values(exponent))


def column_grad(weight_grad: Tensor, register: Tensor, exponent: Tensor, group: int, lead: int = LEAD) -> Tensor:
    """Sum of dL/dW * W over each column, float32 [I]."""
    return (decode(register, exponent, group, torch.float32, lead) * weight_grad).sum(dim=0)


def trits_float8(register: Tensor, turned: bool) -> Tensor:
    """The leading trits as float8 e4m3, which holds them exactly: [O, I], or [I, O] if `turned`."""
    trit = leading_trit(register)
    return (trit.t().contiguous() if turned else trit).to(FLOAT8)
