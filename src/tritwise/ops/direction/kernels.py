"""Triton kernels that bring rows and columns of int8 momenta to equal RMS without ever writing them in between.

Dividing rows and columns by their RMS in turn forgets all but the last division of each kind: after two rounds
x = m * row * column, with row = 1 / RMS of a row of m * first column factors, and so on. So each pass reads int8 and
writes a factor for every row, or sums of squares for every column and strip of rows, of which a small one makes factors
(adding up in one order, so that runs repeat). Shape suffixes: M matrices of one shape, O rows, I columns, S strips.
"""

import triton
import triton.language as tl

TINY = tl.constexpr(1e-30)


@triton.jit
def inverse_rms(squares, count):
    """1 / RMS of `count` numbers whose squares add up to `squares`; huge for zeros, which then stay zeros."""
    return 1.0 / (tl.sqrt_rn(squares * (1.0 / count)) + TINY)  # a count of 1 comes as a constant


@triton.jit
def column_factors(squares, out, rows, columns, strips, STRIPS: tl.constexpr, BLOCK: tl.constexpr):
    """out [M, I] = 1 / RMS of each column, from sums of squares [M, S, I]. STRIPS: a power of two, at least S."""
    across = tl.cdiv(columns, BLOCK)
    matrix = tl.program_id(0) // across
    column, strip = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STRIPS)
    at = (matrix * strips + strip)[:, None] * columns + column[None, :]
    part = tl.load(squares + at, mask=(strip < strips)[:, None] & (column < columns)[None, :], other=0.0)
    tl.store(out + matrix * columns + column, inverse_rms(tl.sum(part, axis=0), rows), mask=column < columns)


@triton.jit
def row_factors(
    momentum,
    column_factor,
    out,
    rows,
    columns,
    SPAN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out [M, O] = 1 / RMS of each row of momentum [M, O, I], its columns weighed by column_factor [M, I] unless that
    is None. SPAN: at least the columns."""
    down = tl.cdiv(rows, BLOCK_R)
    matrix = tl.program_id(0) // down
    row = tl.program_id(0) % down * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for left in range(0, SPAN, BLOCK_C):
        column = left + tl.arange(0, BLOCK_C)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        at = (matrix * rows + row).to(tl.int64)[:, None] * columns + column[None, :]
        value = tl.load(momentum + at, mask=mask, other=0).to(tl.float32)
        if column_factor is not None:
            value *= tl.load(column_factor + matrix * columns + column, mask=column < columns, other=0.0)[None, :]
        total += value * value
    tl.store(out + matrix * rows + row, inverse_rms(tl.sum(total, axis=1), columns), mask=row < rows)


@triton.jit
def column_squares(
    momentum,
    row_factor,
    out,
    rows,
    columns,
    strips,
    STRIP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out [M, S, I] = sums of squares of row_factor * momentum over each strip of STRIP rows."""
    across = tl.cdiv(columns, BLOCK_C)
    column = tl.program_id(0) % across * BLOCK_C + tl.arange(0, BLOCK_C)
    strip = tl.program_id(0) // across % strips
    matrix = tl.program_id(0) // across // strips
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for down in range(0, STRIP, BLOCK_R):
        row = strip * STRIP + down + tl.arange(0, BLOCK_R)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        at = (matrix * rows + row).to(tl.int64)[:, None] * columns + column[None, :]
        factor = tl.load(row_factor + matrix * rows + row, mask=row < rows, other=0.0)
        value = tl.load(momentum + at, mask=mask, other=0).to(tl.float32) * factor[:, None]
        total += value * value
    to = (matrix * strips + strip) * columns + column
    tl.store(out + to, tl.sum(total, axis=0), mask=column < columns)


@triton.jit
def weigh(
    momentum,
    row_factor,
    column_factor,
    scale,
    plus,
    out,
    rows,
    columns,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out [M, O, I] = momentum * row_factor [M, O] * column_factor [M, I] * scale [M], plus `plus` where given, in its
    own type."""
    across, down = tl.cdiv(columns, BLOCK_C), tl.cdiv(rows, BLOCK_R)
    column = tl.program_id(0) % across * BLOCK_C + tl.arange(0, BLOCK_C)
    matrix = tl.program_id(0) // across // down
    row = tl.program_id(0) // across % down * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    at = (matrix * rows + row).to(tl.int64)[:, None] * columns + column[None, :]
    factor = tl.load(row_factor + matrix * rows + row, mask=row < rows, other=0.0)
    value = tl.load(momentum + at, mask=mask, other=0).to(tl.float32) * factor[:, None]
    value *= tl.load(column_factor + matrix * columns + column, mask=column < columns, other=0.0)[None, :]
    value *= tl.load(scale + matrix)
    if plus is not None:
        value += tl.load(plus + at, mask=mask, other=0.0)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def spread(x, scale, addresses, count, scaled, BLOCK: tl.constexpr):
    """The `count` numbers of each matrix of x, times their scale, as float32 to the address that it has in a table.
    scale: one number for every `scaled` of x, which divides `count`."""
    blocks = tl.cdiv(count, BLOCK)
    matrix = tl.program_id(0) // blocks
    index = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + matrix.to(tl.int64) * count + index, mask=index < count, other=0.0).to(tl.float32)
    factor = tl.load(scale + matrix * (count // scaled) + index // scaled, mask=index < count, other=0.0)
    to = tl.load(addresses + matrix).to(tl.pointer_type(tl.float32))  # pyright: ignore[reportArgumentType]
    tl.store(to + index, value * factor, mask=index < count)
