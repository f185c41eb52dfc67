"""Triton kernels that bring rows and columns of int8 momenta to equal RMS without ever writing them in between.

Dividing rows and columns by their RMS in turn forgets all but the last division of each kind: after two rounds
x = m * row * column, with row = 1 / RMS of a row of m * first column factors, and so on. So each pass reads int8 and
writes a factor for every row, or sums of squares for every column and strip of rows, of which a small one makes factors
(adding up in one order, so that runs repeat). Shape suffixes: M matrices of one shape, O rows, I columns, S strips.
"""

import triton
import triton.language as tl

TINY = tl.constexpr(1e-30)
LEVELS, LEVEL_FLOOR = tl.constexpr(1024.0), tl.constexpr(-32768.0)  # as in the reference


@triton.jit
def inverse_rms(squares, count):
    """1 / RMS of `count` numbers whose squares add up to `squares`; huge for zeros, which then stay zeros."""
    return 1.0 / (tl.sqrt_rn(squares * (1.0 / count)) + TINY)  # a count of 1 comes as a constant


@triton.jit
def column_factors(squares, out, full, rows, columns, strips, STRIPS: tl.constexpr, BLOCK: tl.constexpr):
    """out [M, I] = 1 / RMS of each column, from sums of squares [M, S, I]; full [M], int32, counts the columns that are
    not all zeros, unless it is None. STRIPS: a power of two, at least S."""
    across = tl.cdiv(columns, BLOCK)
    matrix = tl.program_id(0) // across
    column, strip = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STRIPS)
    at = (matrix * strips + strip)[:, None] * columns + column[None, :]
    part = tl.load(squares + at, mask=(strip < strips)[:, None] & (column < columns)[None, :], other=0.0)
    total = tl.sum(part, axis=0)
    tl.store(out + matrix * columns + column, inverse_rms(total, rows), mask=column < columns)
    if full is not None:
        tl.atomic_add(full + matrix, tl.sum((total > 0).to(tl.int32)))


@triton.jit
def row_factors(
    momentum,
    column_factor,
    out,
    squares,
    rows,
    columns,
    SPAN: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [M, O] = 1 / RMS of each row of momentum [M, O, I], its columns weighed by column_factor [M, I] unless that
    is None; squares [M, S, I] = sums of squares of out * momentum over each strip of STRIP rows. SPAN: at least the
    columns. The second time a program reads its strip it lies in the cache."""
    strips = tl.cdiv(rows, STRIP)
    matrix, strip = tl.program_id(0) // strips, tl.program_id(0) % strips
    row = strip * STRIP + tl.arange(0, STRIP)
    start = (matrix * rows + row).to(tl.int64)[:, None] * columns
    total = tl.zeros((STRIP, BLOCK), dtype=tl.float32)
    for left in range(0, SPAN, BLOCK):
        column = left + tl.arange(0, BLOCK)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        value = tl.load(momentum + start + column[None, :], mask=mask, other=0).to(tl.float32)
        if column_factor is not None:
            value *= tl.load(column_factor + matrix * columns + column, mask=column < columns, other=0.0)[None, :]
        total += value * value
    factor = inverse_rms(tl.sum(total, axis=1), columns)
    tl.store(out + matrix * rows + row, factor, mask=row < rows)
    for left in range(0, SPAN, BLOCK):
        column = left + tl.arange(0, BLOCK)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        value = tl.load(momentum + start + column[None, :], mask=mask, other=0).to(tl.float32) * factor[:, None]
        to = (matrix * strips + strip) * columns + column
        tl.store(squares + to, tl.sum(value * value, axis=0), mask=column < columns)


@triton.jit
def weigh(
    momentum,
    row_factor,
    column_factor,
    full,
    size,
    plus,
    out,
    rows,
    columns,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out [M, O, I], in its own type = momentum * row_factor [M, O] * column_factor [M, I], brought to the Frobenius
    norm `size`, plus `plus` where given. full [M]: columns that are not all zeros, each of RMS 1 before."""
    across, down = tl.cdiv(columns, BLOCK_C), tl.cdiv(rows, BLOCK_R)
    column = tl.program_id(0) % across * BLOCK_C + tl.arange(0, BLOCK_C)
    matrix = tl.program_id(0) // across // down
    row = tl.program_id(0) // across % down * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    at = (matrix * rows + row).to(tl.int64)[:, None] * columns + column[None, :]
    factor = tl.load(row_factor + matrix * rows + row, mask=row < rows, other=0.0)
    value = tl.load(momentum + at, mask=mask, other=0).to(tl.float32) * factor[:, None]
    value *= tl.load(column_factor + matrix * columns + column, mask=column < columns, other=0.0)[None, :]
    value *= size / tl.sqrt_rn(tl.maximum(tl.load(full + matrix), 1).to(tl.float32) * rows)
    if plus is not None:
        value += tl.load(plus + at, mask=mask, other=0.0)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def mean_square(level, norm, scale, at, mask, memory, columns):
    """Of rows: the running mean of their squares after one more, and that one, of a norm times a scale."""
    value = tl.load(norm + at, mask=mask, other=0.0) * scale
    square = value * value / columns
    kept = tl.exp2(tl.load(level + at, mask=mask, other=0).to(tl.float32) / LEVELS)
    return kept * memory + square * (1.0 - memory), square


@triton.jit
def row_scales(
    norm,
    level,
    after,
    out,
    table,
    memory,
    rows,
    columns,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
):
    """out [M, O] = what the rows of a direction are multiplied by, from their Euclidean norms [M, O].

    A program serves matrices that lie one above the other and get unit RMS together: the table, int64 [programs, 2],
    has the first of them and their number. SPAN: at least the rows that any program has. level: None, or what is
    remembered of every row, int16 [M, O]: rows are steadied, and `after` gets what is to be remembered.
    """
    start = tl.load(table + 2 * tl.program_id(0)) * rows
    count = (tl.load(table + 2 * tl.program_id(0) + 1) * rows).to(tl.int32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, SPAN, BLOCK):
        row = first + tl.arange(0, BLOCK)
        value = tl.load(norm + start + row, mask=row < count, other=0.0)
        total += value * value
    scale = inverse_rms(tl.sum(total, axis=0), count.to(tl.float32) * columns)
    again = 1.0
    if level is not None:
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, SPAN, BLOCK):
            row = first + tl.arange(0, BLOCK)
            mean, square = mean_square(level, norm, scale, start + row, row < count, memory, columns)
            total += tl.where(row < count, square / mean, 0.0)
            told = tl.log2(mean) * LEVELS
            size = (tl.abs(told) + 8388608.0) - 8388608.0  # rounded half to even
            told = tl.maximum(tl.where(told < 0, 0.0 - size, size), LEVEL_FLOOR)
            told = tl.minimum(told, -LEVEL_FLOOR - 1.0)
            tl.store(after + start + row, told.to(tl.int16), mask=row < count)
        again = inverse_rms(tl.sum(total, axis=0), count.to(tl.float32))
    for first in range(0, SPAN, BLOCK):
        row = first + tl.arange(0, BLOCK)
        factor = tl.zeros((BLOCK,), dtype=tl.float32) + scale
        if level is not None:
            mean, _ = mean_square(level, norm, scale, start + row, row < count, memory, columns)
            factor = tl.minimum(factor * again / tl.sqrt_rn(mean), 1.0 / TINY)  # a matrix of zeros stays one
        tl.store(out + start + row, factor, mask=row < count)


@triton.jit
def spread(x, scale, addresses, count, columns, BLOCK: tl.constexpr):
    """The `count` numbers of each matrix of x, rows of `columns` times their scale, as float32 to the address that it
    has in a table."""
    blocks = tl.cdiv(count, BLOCK)
    matrix = tl.program_id(0) // blocks
    index = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + matrix.to(tl.int64) * count + index, mask=index < count, other=0.0).to(tl.float32)
    factor = tl.load(scale + matrix * (count // columns) + index // columns, mask=index < count, other=0.0)
    to = tl.load(addresses + matrix).to(tl.pointer_type(tl.float32))  # pyright: ignore[reportArgumentType]
    tl.store(to + index, value * factor, mask=index < count)
