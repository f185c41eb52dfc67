"""Triton kernels of the ternary linear: gradients of scales, of one matrix or of many in one launch, and float8 trits.

Of many, a table tells as in `tritwise.ops.triton_kernels`, with columns of its own. Sums of floats come in the same
order either way, if a matrix is told of with the same hints: ALIGNED says that addresses are multiples of 16 bytes, and
columns and group of 16 numbers, which a launch for one finds out by itself.
"""

import triton
import triton.language as tl

from tritwise.ops.triton_kernels import FIELDS, FIRST, address, find, leading_number

GRAD, REGISTER, EXPONENT, OUT = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)  # addresses
ROWS, COLUMNS, GROUPS, GROUP = tl.constexpr(5), tl.constexpr(6), tl.constexpr(7), tl.constexpr(8)


@triton.jit
def told(line):
    """Of an aligned matrix: the program's number in it, its four addresses, rows, columns, groups and group."""
    program = tl.program_id(0) - tl.load(line + FIRST).to(tl.int32)
    grad, register = address(line + GRAD, tl.float32, True), address(line + REGISTER, tl.int8, True)
    exponent, out = address(line + EXPONENT, tl.int8, True), address(line + OUT, tl.float32, True)
    rows, columns = tl.load(line + ROWS).to(tl.int32), tl.multiple_of(tl.load(line + COLUMNS).to(tl.int32), 16)
    groups, group = tl.load(line + GROUPS).to(tl.int32), tl.multiple_of(tl.load(line + GROUP).to(tl.int32), 16)
    return program, grad, register, exponent, out, rows, columns, groups, group


@triton.jit
def sum_groups(
    program,
    weight_grad,
    register,
    exponent,
    out,
    rows,
    columns,
    groups,
    group,
    scales,
    LEAD: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A program of `scale_grad`."""
    row = (program // groups).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    number = program % groups
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for at in range(0, SPAN, BLOCK_C):
        within = at + tl.arange(0, BLOCK_C)
        column = number * group + within
        mask = (row < rows)[:, None] & ((within < group) & (column < columns))[None, :]
        where = row[:, None] * columns + column[None, :]
        weight = leading_number(tl.load(register + where, mask=mask, other=0), LEAD)
        total += weight.to(tl.float32) * tl.load(weight_grad + where, mask=mask, other=0.0)
    to = row * groups + number
    e = tl.load(exponent + to, mask=row < rows, other=0).to(tl.int32)
    tl.store(out + to, tl.sum(total, axis=1) * tl.load(scales + (e + 128)), mask=row < rows)


@triton.jit
def scale_grad(
    weight_grad,
    register,
    exponent,
    out,
    rows,
    columns,
    groups,
    group,
    scales,
    LEAD: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out [rows, groups] = scale * the sum of round(register / LEAD) * weight_grad over each group. SPAN: columns of
    the widest."""
    matrix = weight_grad, register, exponent, out, rows, columns, groups, group
    sum_groups(tl.program_id(0), *matrix, scales, LEAD, SPAN, BLOCK_R, BLOCK_C)


@triton.jit
def scale_grads(
    table,
    scales,
    tensors,
    TENSORS: tl.constexpr,
    LEAD: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`scale_grad` of many matrices."""
    line = table + find(table, tensors, TENSORS) * FIELDS
    program, grad, register, exponent, out, rows, columns, groups, group = told(line)
    matrix = grad, register, exponent, out, rows, columns, groups, group
    sum_groups(program, *matrix, scales, LEAD, SPAN, BLOCK_R, BLOCK_C)


@triton.jit
def sum_strip(
    program,
    weight_grad,
    register,
    exponent,
    out,
    rows,
    columns,
    groups,
    group,
    scales,
    LEAD: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A program of `column_grad`."""
    across = tl.cdiv(columns, BLOCK_C)
    strip = program // across
    column = program % across * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for at in range(0, STRIP, BLOCK_R):
        row = strip.to(tl.int64) * STRIP + at + tl.arange(0, BLOCK_R)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        where = row[:, None] * columns + column[None, :]
        weight = leading_number(tl.load(register + where, mask=mask, other=0), LEAD).to(tl.float32)
        e = tl.load(exponent + row[:, None] * groups + (column // group)[None, :], mask=mask, other=0).to(tl.int32)
        total += weight * tl.load(scales + (e + 128)) * tl.load(weight_grad + where, mask=mask, other=0.0)
    tl.store(out + strip * columns + column, tl.sum(total, axis=0), mask=column < columns)


@triton.jit
def column_grad(
    weight_grad,
    register,
    exponent,
    out,
    rows,
    columns,
    groups,
    group,
    scales,
    LEAD: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out [strips, columns] = the sum of W * weight_grad over each strip of STRIP rows."""
    matrix = weight_grad, register, exponent, out, rows, columns, groups, group
    sum_strip(tl.program_id(0), *matrix, scales, LEAD, STRIP, BLOCK_R, BLOCK_C)


@triton.jit
def column_grads(
    table,
    scales,
    tensors,
    TENSORS: tl.constexpr,
    LEAD: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`column_grad` of many matrices."""
    line = table + find(table, tensors, TENSORS) * FIELDS
    program, grad, register, exponent, out, rows, columns, groups, group = told(line)
    matrix = grad, register, exponent, out, rows, columns, groups, group
    sum_strip(program, *matrix, scales, LEAD, STRIP, BLOCK_R, BLOCK_C)


@triton.jit
def strip_sums(table, tensors, TENSORS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """out [columns] = the sum of what column_grad wrote, [strips, columns], of many matrices. Of a line GRAD is where
    that lies and ROWS the number of strips; SPAN: at least as many."""
    line = table + find(table, tensors, TENSORS) * FIELDS
    strips, columns = tl.load(line + ROWS).to(tl.int32), tl.load(line + COLUMNS).to(tl.int32)
    column = (tl.program_id(0) - tl.load(line + FIRST).to(tl.int32)) * BLOCK + tl.arange(0, BLOCK)
    parts, out = address(line + GRAD, tl.float32, True), address(line + OUT, tl.float32, True)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for strip in range(0, SPAN):
        mask = (column < columns) & (strip < strips)
        total += tl.load(parts + strip * columns + column, mask=mask, other=0.0)
    tl.store(out + column, total, mask=column < columns)


@triton.jit
def float8_of(register):
    """Leading trits as bytes of float8 e4m3."""
    return (tl.where(register > 40, 0x38, 0) | tl.where(register < -40, 0xB8, 0)).to(tl.uint8)  # 1 and -1


@triton.jit
def trits_float8(register, out, rows, columns, TURNED: tl.constexpr, BLOCK: tl.constexpr):
    """out = the leading trits of register [rows, columns] as bytes of float8 e4m3; [columns, rows] if TURNED."""
    across = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // across).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    r = tl.load(register + row[:, None] * columns + column[None, :], mask=mask, other=0)
    if TURNED:
        to = out + column[:, None] * rows + row[None, :]
        tl.store(to, tl.trans(float8_of(r)), mask=tl.trans(mask))
    else:
        tl.store(out + row[:, None] * columns + column[None, :], float8_of(r), mask=mask)
