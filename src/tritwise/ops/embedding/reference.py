"""The oracle of the ternary embedding: only the rows that are asked for are decoded."""

import torch
from torch import Tensor

from tritwise.ops.linear.reference import decode
from tritwise.registers import LEAD


def forward(
    ids: Tensor, register: Tensor, exponent: Tensor, group: int, dtype: torch.dtype, lead: int = LEAD
) -> Tensor:
    """W[ids] as `dtype` [..., D]."""
    flat = ids.reshape(-1)
    if flat.numel() >= register.shape[0]:  # a small table: decode it once, then gather
        rows = torch.nn.functional.embedding(flat, decode(register, exponent, group, dtype, lead))
    else:
        rows = decode(register.index_select(0, flat), exponent.index_select(0, flat), group, dtype, lead)
    return rows.view(*ids.shape, register.shape[1])


def weight_grad(grad: Tensor, ids: Tensor, rows: int) -> Tensor:
    """dL/dW [V, D] float32: each row is the sum of the gradients of its uses."""
    total_VD = grad.new_zeros(rows, grad.shape[-1], dtype=torch.float32)
    return total_VD.index_add_(0, ids.reshape(-1), grad.reshape(-1, grad.shape[-1]).float())
