"""The oracle of the squared ReLU with a norm, in torch, in float32 (float64 for float64)."""

import torch
from torch import Tensor

EPS = 1e-6
"""What every norm adds to a mean square."""


def forward(h: Tensor, scale: Tensor | None, leak: float) -> tuple[Tensor, Tensor]:
    """See `tritwise.ops.activation.relu_squared_norm`."""
    square = _slanted(h, leak).square()
    inverse = torch.rsqrt(square.square().mean(dim=-1) + EPS)
    y = square * inverse[..., None]
    return (y if scale is None else y * scale.to(y.dtype)).to(h.dtype), inverse


def backward(grad: Tensor, h: Tensor, inverse: Tensor, scale: Tensor | None, leak: float) -> Tensor:
    """dL/dh of h's dtype."""
    slanted = _slanted(h, leak)
    y, g = slanted.square() * inverse[..., None], grad.to(slanted.dtype)
    if scale is not None:
        g = g * scale.to(g.dtype)
    of_square = (g - y * (g * y).mean(dim=-1, keepdim=True)) * inverse[..., None]
    slope = torch.where(h < 0, leak, 1.0).to(y.dtype)
    return (of_square * 2 * slanted * slope).to(h.dtype)


def _slanted(h: Tensor, leak: float) -> Tensor:
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    return torch.where(wide < 0, wide * leak, wide)
