"""The ternary embedding on a GPU: a kernel gathers and decodes rows in one pass; the gradient has fixed bits."""

import torch
from torch import Tensor

from tritwise.ops import gpu
from tritwise.ops.embedding import reference


def forward(ids: Tensor, register: Tensor, exponent: Tensor, group: int) -> Tensor:
    """W[ids] as float32 [..., D]. On a GPU an id outside the table gives a row of NaN: to look would be to wait."""
    served = ids.dtype is torch.int64 and ids.numel() > 0 and ids.device == register.device
    if not served or not gpu.is_served(register, exponent, group):
        return reference.forward(ids, register, exponent, group)
    rows = register.shape[0]
    if ids.is_cpu and not bool(((ids >= 0) & (ids < rows)).all()):
        return reference.forward(ids, register, exponent, group)  # says which id it is
    flat = ids.reshape(-1).contiguous()
    return gpu.decode(register, exponent, group, torch.float32, flat).view(*ids.shape, register.shape[1])


def weight_grad(grad: Tensor, ids: Tensor, rows: int) -> Tensor:
    """dL/dW [V, D] float32: each row is the sum of the gradients of its uses, in the same order every time.

    The reference's index_add_ adds by atomics on a GPU, in any order. torch's gradient of its own embedding sorts the
    ids and sums runs of equal ones.
    """
    grad_ND = grad.reshape(-1, grad.shape[-1]).float()
    return torch.ops.aten.embedding_dense_backward(grad_ND, ids.reshape(-1), rows, -1, False)
