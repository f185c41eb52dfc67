"""The ternary embedding on a CPU: each row asked for is decoded in C, straight into its place. The reference's bits."""

import torch
from torch import Tensor

from tritwise.ops.embedding import reference
from tritwise.ops.linear.cpu import CPU, is_served
from tritwise.ops.native import kernels
from tritwise.registers import LEAD, scale_table


def forward(
    ids: Tensor, register: Tensor, exponent: Tensor, group: int, dtype: torch.dtype, lead: int = LEAD
) -> Tensor:
    """W[ids] as `dtype` [..., D]."""
    if ids.dtype is torch.int64 and ids.is_cpu and is_served(register, exponent, group):
        i, r, e, scales = ids.contiguous(), register.contiguous(), exponent.contiguous(), scale_table(CPU)
        rows, columns = r.shape
        out = torch.empty(*ids.shape, columns, dtype=torch.float32, device=CPU)
        pointers = (i.data_ptr(), r.data_ptr(), e.data_ptr(), scales.data_ptr(), out.data_ptr())
        if kernels().gather(*pointers, i.numel(), rows, columns, group, lead):
            return out.to(dtype)
    return reference.forward(ids, register, exponent, group, dtype, lead)  # also to say which id is out of range


weight_grad = reference.weight_grad
