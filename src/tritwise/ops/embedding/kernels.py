"""Triton kernels of the gradient of an embedding table, in the same order always.

Of a small one it is a product with a one-hot matrix: no ids are sorted, which row a token uses is compared with all
rows, and the matrix units add. They multiply bfloat16, of which a float32 is the sum of three, cut out of its bits. A
number that is not finite spoils its column in all rows, because 0 times it is not 0. Of a large one ids are sorted.
"""

import triton
import triton.language as tl

FIRST_BITS = tl.constexpr(-65536)  # sign, exponent and the first 8 bits of a float32: what a bfloat16 holds


@triton.jit
def narrow(x, NARROW: tl.constexpr):
    """float32 x as bfloat16, if NARROW."""
    if NARROW:
        x = x.to(tl.bfloat16)
    return x


@triton.jit
def cut(x, NARROW: tl.constexpr):
    """The part of float32 x that a bfloat16 holds, rounded towards zero, and what is left."""
    part = (x.to(tl.int32, bitcast=True) & FIRST_BITS).to(tl.float32, bitcast=True)
    return narrow(part, NARROW), x - part


@triton.jit
def row_sums(
    grad,
    ids,
    out,
    tokens,
    rows,
    columns,
    PARTS: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NARROW: tl.constexpr,
):
    """out [splits, rows, columns]: of each SPAN of tokens, the sum of grad [tokens, columns] over those of each row.

    PARTS: bfloat16s that hold a number of grad. NARROW: they become such; Triton's interpreter multiplies float32 only.
    An id outside the table is of no row.
    """
    across = tl.cdiv(columns, BLOCK_C)
    down = tl.cdiv(rows, BLOCK_V)
    program = tl.program_id(0)
    column = program % across * BLOCK_C + tl.arange(0, BLOCK_C)
    row = program // across % down * BLOCK_V + tl.arange(0, BLOCK_V)
    split = (program // (across * down)).to(tl.int64)
    total = tl.zeros((BLOCK_V, BLOCK_C), dtype=tl.float32)
    for at in range(0, SPAN, BLOCK_N):
        token = split * SPAN + at + tl.arange(0, BLOCK_N)
        used = tl.load(ids + token, mask=token < tokens, other=-1)
        # It is compared with every row: in half the registers.
        used = tl.where((used >= 0) & (used < rows), used, -1).to(tl.int32)
        mask = (token < tokens)[:, None] & (column < columns)[None, :]
        x = tl.load(grad + token[:, None] * columns + column[None, :], mask=mask, other=0.0)
        hot = narrow(tl.where(row[:, None] == used[None, :], 1.0, 0.0), NARROW)
        first, rest = cut(x.to(tl.float32), NARROW)
        second, rest = cut(rest, NARROW)
        third = narrow(rest, NARROW)
        # Matrix units cut off sums where vector units round: they add few tokens, the smallest parts first.
        few = tl.zeros((BLOCK_V, BLOCK_C), dtype=tl.float32)
        if PARTS == 3:
            few = tl.dot(hot, third, few)
        if PARTS >= 2:
            few = tl.dot(hot, second, few)
        few = tl.dot(hot, first, few)
        total += few
    to = out + (split * rows + row[:, None]) * columns + column[None, :]
    tl.store(to, total, mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def run_sums(grad, order, starts, out, columns, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """out [rows, columns]: the sum of grad [tokens, columns] over the tokens of each row, in their order. order: tokens
    sorted by their rows; starts [rows + 1]: where the tokens of each row begin in it."""
    across = tl.cdiv(columns, BLOCK_C)
    program = tl.program_id(0)
    row = (program // across).to(tl.int64)
    column = program % across * BLOCK_C + tl.arange(0, BLOCK_C)
    at, last = tl.load(starts + row), tl.load(starts + row + 1)
    total = tl.zeros((BLOCK_C,), dtype=tl.float32)
    place = at + tl.arange(0, BLOCK_N)
    token = tl.load(order + place, mask=place < last, other=0)
    while at < last:
        # Which tokens come next is asked for before these are waited for: a frequent row is one long chain of loads.
        after = place + BLOCK_N
        then = tl.load(order + after, mask=after < last, other=0)
        mask = (place < last)[:, None] & (column < columns)[None, :]
        x = tl.load(grad + token[:, None] * columns + column[None, :], mask=mask, other=0.0)
        total += tl.sum(x.to(tl.float32), axis=0)
        at, place, token = at + BLOCK_N, after, then
    tl.store(out + row * columns + column, total, mask=column < columns)


@triton.jit
def split_sums(parts, out, splits, count, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """out [count] = the sum of parts [splits, count] over the splits, in order. SPAN: at least as many."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(0, SPAN):
        mask = (at < count) & (split < splits)
        total += tl.load(parts + tl.cast(split, tl.int64) * count + at, mask=mask, other=0.0)
    tl.store(out + at, total, mask=at < count)
