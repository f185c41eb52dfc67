"""The oracle of the squared ReLU with a norm, in torch, in float32 (float64 for float64)."""

import torch
from torch import Tensor

from tritwise.ops.float8 import FLOAT8, times_as_float8

EPS = 1e-6
"""What every norm adds to a mean square."""


def forward(h: Tensor, scale: Tensor | None, leak: float, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `tritwise.ops.activation.relu_squared_norm`."""
    square = _slanted(h, leak).square()
    inverse = torch.rsqrt(square.square().mean(dim=-1) + EPS)
    wide = square * inverse[..., None]
    y = (wide if scale is None else wide * scale.to(wide.dtype)).to(h.dtype)
    return y, inverse, times_as_float8(y, factor) if factor else h.new_empty(0, dtype=FLOAT8)


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
