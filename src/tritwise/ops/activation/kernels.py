"""The squared ReLU with a norm on a GPU. Imported on first use, as `tritwise.ops.triton_kernels` is."""

import triton
import triton.language as tl

from tritwise.ops import float8
from tritwise.ops.activation import reference

EPS = tl.constexpr(reference.EPS)
LARGEST = tl.constexpr(float8.LARGEST)


@triton.jit
def relu_squared_norm(h, scale, out, low, inverses, columns, leak, factor, BLOCK: tl.constexpr):
    """out = p^2 * inverse * scale and inverses = 1 / sqrt(mean(p^4) + EPS) of a row, in float32; p = h, or leak * h
    below zero. low: out * factor as float8, or None."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(h + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    slanted = tl.where(x < 0, x * leak, x)
    square = slanted * slanted
    inverse = 1.0 / tl.sqrt_rn(tl.sum(square * square, axis=0) / columns + EPS)
    y = square * inverse
    if scale is not None:
        y *= tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)
    kept = y.to(out.dtype.element_ty)
    tl.store(out + row * columns + column, kept, mask=inside)
    if low is not None:
        # Nothing is below zero; what is no number stays none.
        scaled = tl.minimum(kept.to(tl.float32) * factor, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        tl.store(low + row * columns + column, scaled.to(low.dtype.element_ty), mask=inside)
    tl.store(inverses + row, inverse)


@triton.jit
def relu_squared_norm_grad(grad, h, inverses, scale, out, columns, leak, BLOCK: tl.constexpr):
    """out = the gradient of h of a row for that of what `relu_squared_norm` gave, in float32."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(h + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        g *= tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.load(inverses + row)
    slanted = tl.where(x < 0, x * leak, x)
    y = slanted * slanted * inverse
    mean = tl.sum(g * y, axis=0) / columns
    slope = tl.where(x < 0, leak, 1.0)
    found = (g - y * mean) * inverse * 2.0 * slanted * slope
    tl.store(out + row * columns + column, found.to(out.dtype.element_ty), mask=inside)
