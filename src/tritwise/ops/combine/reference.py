"""The oracle of the combination of experts, in torch, in float32 (float64 for float64)."""

import torch
from torch import Tensor


def forward(x: Tensor, slot: Tensor, gate: Tensor) -> Tensor:
    """y[n] = sum over k of gate[n, k] * x[slot[n, k]], in the order of k; x's dtype [N, C]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total_NC = x.new_zeros(len(slot), x.shape[1], dtype=wide)
    for k in range(slot.shape[1]):
        total_NC += gate[:, k : k + 1].to(wide) * x[slot[:, k]].to(wide)
    return total_NC.to(x.dtype)


def backward(grad: Tensor, x: Tensor, slot: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dx [S, C] of x's dtype, and dL/dgate [N, K] of the gates'."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_grad_SC, gate_grad_NK = torch.zeros_like(x), torch.empty_like(gate)
    for k in range(slot.shape[1]):
        x_grad_SC[slot[:, k]] = (gate[:, k : k + 1].to(wide) * grad.to(wide)).to(x.dtype)
        gate_grad_NK[:, k] = (grad.to(wide) * x[slot[:, k]].to(wide)).sum(dim=1).to(gate.dtype)
    return x_grad_SC, gate_grad_NK
