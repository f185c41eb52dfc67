"""Message passing on a GPU. Imported on first use, as `tritwise.ops.triton_kernels` is, whose rules hold here too.

The loop over a row's edges has a bound of run time and is a `while`: Triton's interpreter can make no range of it.
"""

import triton
import triton.language as tl


@triton.jit
def edge_sum(x, source, first, out, columns, rows_x, BLOCK: tl.constexpr):
    """out[r] = sum of x[source[e]] for first[r] <= e < first[r + 1], in that order, in float32."""
    across = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // across).to(tl.int64)
    column = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    edge = tl.load(first + row)
    stop = tl.load(first + row + 1)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    while edge < stop:
        at = tl.load(source + edge)
        mask = (column < columns) & (at >= 0) & (at < rows_x)
        total += tl.load(x + at * columns + column, mask=mask, other=0.0).to(tl.float32)
        edge += 1
    tl.store(out + row * columns + column, total.to(out.dtype.element_ty), mask=column < columns)


@triton.jit
def gather_add(base, x, index, out, columns, rows_x, BLOCK: tl.constexpr):
    """out[r] = base[r] + x[index[r]]; an index below 0 adds nothing."""
    across = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // across).to(tl.int64)
    column = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    at = tl.load(index + row)
    value = tl.load(base + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    more = tl.load(x + at * columns + column, mask=inside & (at >= 0) & (at < rows_x), other=0.0).to(tl.float32)
    tl.store(out + row * columns + column, (value + more).to(out.dtype.element_ty), mask=inside)
