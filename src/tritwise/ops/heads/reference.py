"""The oracle of queries and keys, in torch, in float32 (float64 for float64)."""

import torch
from torch import Tensor

from tritwise.ops.activation.reference import EPS


def forward(parts: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """See `tritwise.ops.heads.turned_heads`."""
    keys = (parts.shape[2] - heads) // 2
    normal_BTPD, _ = _normalised(parts[:, :, : heads + keys])
    turned_BTPD = _turned(normal_BTPD, cos[:, None], sin[:, None]).to(parts.dtype)
    return turned_BTPD[:, :, :heads].contiguous(), turned_BTPD[:, :, heads:].contiguous()


def backward(q_grad: Tensor, k_grad: Tensor, v_grad: Tensor, parts: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """dL/dparts of parts' dtype."""
    count = q_grad.shape[2] + k_grad.shape[2]
    y_BTPD, inverse_BTP1 = _normalised(parts[:, :, :count])
    g_BTPD = _turned(torch.cat((q_grad, k_grad), dim=2).to(y_BTPD.dtype), cos[:, None], -sin[:, None])
    of_parts = (g_BTPD - y_BTPD * (g_BTPD * y_BTPD).mean(dim=-1, keepdim=True)) * inverse_BTP1
    return torch.cat((of_parts.to(parts.dtype), v_grad.to(parts.dtype)), dim=2)


def _normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + EPS)
    return wide * inverse, inverse


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
