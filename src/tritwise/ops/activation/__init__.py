"""What stands between the two matrices of an MLP, as one pass each way: relu squared, normalised, columns scaled.

    p = leaky_relu(h, leak)      inverse = 1 / sqrt(mean(p^4) + EPS)      y = p^2 * inverse * scale

the mean being over the last dimension. Backward needs h and inverse, and nothing that y could be read from. Written as
torch's own operations it walks memory five times, and a compiler that cannot hold a row at once still three times.

Shape suffixes: N rows, C columns.
"""

import torch
from torch import Tensor

from tritwise.ops import gpu
from tritwise.ops.activation import reference, triton
from tritwise.ops.backends import choose, implement
from tritwise.ops.float8 import FLOAT8
from tritwise.ops.library import define

implement("activation", "reference", reference)
implement("activation", "triton", triton, priority=20, devices=("cuda",), refuses=gpu.refuses)


def _forward(h: Tensor, scale: Tensor | None, leak: float, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    return choose("activation", h.device).forward(h, scale, leak, factor)


def _backward(grad: Tensor, h: Tensor, inverse: Tensor, scale: Tensor | None, leak: float) -> Tensor:
    return choose("activation", h.device).backward(grad, h, inverse, scale, leak)


_relu_squared_norm = define(
    "relu_squared_norm(Tensor h, Tensor? scale, float leak, float factor) -> (Tensor, Tensor, Tensor)",
    _forward,
    lambda h, scale, leak, factor: (
        h.new_empty(h.shape),
        h.new_empty(h.shape[:-1], dtype=torch.promote_types(h.dtype, torch.float32)),
        h.new_empty(h.shape if factor else 0, dtype=FLOAT8),
    ),
)
_relu_squared_norm_grad = define(
    "relu_squared_norm_grad(Tensor grad, Tensor h, Tensor inverse, Tensor? scale, float leak) -> Tensor",
    _backward,
    lambda grad, h, inverse, scale, leak: h.new_empty(h.shape),
)


def relu_squared_norm(
    h: Tensor, scale: Tensor | None = None, leak: float = 0.0, factor: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """y of h's dtype [..., C], inverse, float32 [...], and y times `factor` as float8 [..., C], or [0] if it is 0.

    h: float [..., C]; scale: of h's dtype [C], not below zero, which gets no gradient, or None. No gradient is
    recorded: `nn.relu_squared_norm` does that."""
    return _relu_squared_norm(h, scale, leak, factor)


def relu_squared_norm_grad(
    grad: Tensor, h: Tensor, inverse: Tensor, scale: Tensor | None = None, leak: float = 0.0
) -> Tensor:
    """dL/dh of h's dtype [..., C] for dL/dy, with what `relu_squared_norm` was given and gave."""
    return _relu_squared_norm_grad(grad, h, inverse, scale, leak)
