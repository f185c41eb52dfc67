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


def without_own(y: Tensor, v: Tensor, scale: Tensor | None) -> Tensor:
    """See `tritwise.ops.heads.without_own`."""
    n_BTHD, _ = _unit(y)
    own_BTHD = _for_each_head(v, y.shape[2]).to(n_BTHD.dtype)
    along_BTH1 = (n_BTHD * own_BTHD).sum(-1, keepdim=True) / own_BTHD.square().sum(-1, keepdim=True).clamp_min(EPS)
    left_BTC = (n_BTHD - along_BTH1 * own_BTHD).flatten(2)
    return (left_BTC if scale is None else left_BTC * scale.to(left_BTC.dtype)).to(y.dtype)


def without_own_grad(grad: Tensor, y: Tensor, v: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """dL/dy and dL/dv, of their dtypes and shapes, contiguous."""
    n_BTHD, inverse_BT11 = _unit(y)
    own_BTHD = _for_each_head(v, y.shape[2]).to(n_BTHD.dtype)
    g_BTHD = grad.to(n_BTHD.dtype)
    g_BTHD = (g_BTHD if scale is None else g_BTHD * scale.to(g_BTHD.dtype)).view(y.shape)
    square_BTH1 = own_BTHD.square().sum(-1, keepdim=True)
    length_BTH1 = square_BTH1.clamp_min(EPS)
    along_BTH1, of_g_BTH1 = ((x * own_BTHD).sum(-1, keepdim=True) / length_BTH1 for x in (n_BTHD, g_BTHD))
    bend_BTH1 = torch.where(square_BTH1 > EPS, 2 * along_BTH1 * of_g_BTH1, 0.0)
    found_BTHD = bend_BTH1 * own_BTHD - along_BTH1 * g_BTHD - of_g_BTH1 * n_BTHD
    left_BTHD = g_BTHD - of_g_BTH1 * own_BTHD
    y_grad = (left_BTHD - n_BTHD * (left_BTHD * n_BTHD).mean(dim=(2, 3), keepdim=True)) * inverse_BT11
    v_grad = found_BTHD.unflatten(2, (v.shape[2], -1)).sum(dim=3)
    return y_grad.to(y.dtype), v_grad.to(v.dtype)


def _unit(y: Tensor) -> tuple[Tensor, Tensor]:
    """All heads of a position together at unit RMS, and what they were multiplied by."""
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    inverse = torch.rsqrt(wide.square().mean(dim=(2, 3), keepdim=True) + EPS)
    return wide * inverse, inverse


def _for_each_head(v: Tensor, heads: int) -> Tensor:
    """The values [B, T, K, D] that H heads have: H / K neighbours the same."""
    return v.repeat_interleave(heads // v.shape[2], dim=2)


def _normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + EPS)
    return wide * inverse, inverse


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
