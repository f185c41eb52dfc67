"""Normalisation without learned gain, alone and behind a squared ReLU: there is nothing to train and nothing to ship.

Both are written as one function with its own backward. On a CPU torch's composite RMSNorm walks memory about ten times
a pass; here forward reads x twice and backward four times. On a GPU the second is an operation of its own
(`ops.activation`): its rows are too long for what torch.compile makes of it to hold one. While torch.compile traces
them nothing is changed in place: torch 2.11 then saves the square for backward as it was before the change, and the
gradient of the layer below is wrong. The compiler does away with the copies, and the bits are the same.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tritwise import ops
from tritwise.ops.activation.reference import EPS


def _inverse_rms(x: Tensor) -> Tensor:
    """1 / sqrt(mean(x^2) + EPS) over the last dimension, kept as size 1, float32."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.rsqrt(norm * norm / x.shape[-1] + EPS)


def _norm_grad(grad: Tensor, y: Tensor) -> Tensor:
    """dL/dy - y * mean(dL/dy * y): the gradient of y = x * inverse_rms(x) up to that factor. A new tensor."""
    product = grad * y
    return torch.addcmul(grad, y, product.mean(dim=-1, keepdim=True), value=-1)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        inverse = _inverse_rms(x).to(x.dtype)
        y = x * inverse
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        y, inverse = ctx.saved_tensors
        return _norm_grad(grad, y) * inverse if torch.compiler.is_compiling() else _norm_grad(grad, y).mul_(inverse)


class _ReLUSquaredNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, leak: float) -> Tensor:
        positive = torch.relu(h) if leak == 0 else torch.nn.functional.leaky_relu(h, leak)
        y = positive * positive
        inverse = _inverse_rms(y).to(h.dtype)
        y = y * inverse if torch.compiler.is_compiling() else y.mul_(inverse)
        ctx.save_for_backward(positive, y, inverse)
        ctx.leak = leak
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        positive, y, inverse = ctx.saved_tensors
        if ctx.leak:  # the slope below zero once more
            positive = torch.where(positive < 0, positive * ctx.leak, positive)
        if torch.compiler.is_compiling():
            return _norm_grad(grad, y) * positive * (2 * inverse), None
        return _norm_grad(grad, y).mul_(positive).mul_(2 * inverse), None


class _FusedReLUSquaredNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, leak: float, scale: Tensor | None, factor: float) -> tuple[Tensor, Tensor]:
        y, inverse, low = ops.relu_squared_norm(h, scale, leak, factor)
        ctx.save_for_backward(h, inverse, scale)
        ctx.mark_non_differentiable(low)
        ctx.leak = leak
        return y, low

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        h, inverse, scale = ctx.saved_tensors
        return ops.relu_squared_norm_grad(grad, h, inverse, scale, ctx.leak), None, None, None


def fuses(x: Tensor) -> bool:
    """Whether x lies where operations of several passes are written as one."""
    return x.is_cuda


def rms_norm(x: Tensor) -> Tensor:
    """x over the root mean square of its last dimension (Zhang and Sennrich 2019), eps 1e-6; same shape and dtype."""
    return _RMSNorm.apply(x)  # type: ignore[no-any-return]


def relu_squared_norm(h: Tensor, leak: float = 0.0, scale: Tensor | None = None) -> Tensor:
    """rms_norm(relu(h)^2): the square has a heavy tail; normalised, the next linear sees inputs of unit RMS.

    leak: slope below zero, of leaky_relu(h, leak)^2; 0 is relu. scale: what each column is multiplied by at last, of
    h's dtype [columns]; it gets no gradient.
    """
    return relu_squared_norm_low(h, leak, scale, 0.0)[0]


def relu_squared_norm_low(h: Tensor, leak: float, scale: Tensor | None, factor: float) -> tuple[Tensor, Tensor | None]:
    """`relu_squared_norm`, and the same times `factor` as float8 [..., columns] if that costs no pass of its own, else
    None: always if factor is 0."""
    if fuses(h):
        y, low = _FusedReLUSquaredNorm.apply(h, leak, scale, factor)  # type: ignore[misc]
        return y, low if factor else None
    y = _ReLUSquaredNorm.apply(h, leak)
    return y if scale is None else y * scale, None  # type: ignore[operator, return-value]
