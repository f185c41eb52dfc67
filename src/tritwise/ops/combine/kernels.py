"""The combination of experts on a GPU. Imported on first use, as `tritwise.ops.triton_kernels` is."""

import triton
import triton.language as tl


@triton.jit
def forward(x, slot, gate, out, columns, K: tl.constexpr, BLOCK: tl.constexpr):
    """out[n] = sum over k of gate[n, k] * x[slot[n, k]], in float32, in the order of k."""
    across = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // across).to(tl.int64)
    column = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(K):  # pyright: ignore[reportGeneralTypeIssues]
        at = tl.load(slot + row * K + k)
        weight = tl.load(gate + row * K + k).to(tl.float32)
        total += weight * tl.load(x + at * columns + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward(grad, x, slot, gate, x_grad, gate_grad, columns, K: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """x_grad[slot[n, k]] = gate[n, k] * grad[n] and gate_grad[n, k] = grad[n] · x[slot[n, k]]. SPAN: of all columns."""
    row = tl.program_id(0).to(tl.int64)
    for k in tl.static_range(K):  # pyright: ignore[reportGeneralTypeIssues]
        at = tl.load(slot + row * K + k)
        weight = tl.load(gate + row * K + k).to(tl.float32)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for left in tl.static_range(0, SPAN, BLOCK):  # pyright: ignore[reportGeneralTypeIssues]
            column = left + tl.arange(0, BLOCK)
            inside = column < columns
            g = tl.load(grad + row * columns + column, mask=inside, other=0.0).to(tl.float32)
            total += g * tl.load(x + at * columns + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(x_grad + at * columns + column, (weight * g).to(x_grad.dtype.element_ty), mask=inside)
        tl.store(gate_grad + row * K + k, tl.sum(total, axis=0).to(gate_grad.dtype.element_ty))
