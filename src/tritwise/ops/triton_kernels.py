"""The arithmetic of the "triton" backend: what native.c is to the "cpu" backend. Imported on first use (`gpu.py`).

Integers have the same bits as the torch reference (ops/update/reference.py, registers/random.py): the same float32
operations in the same order, one rounding each. Launch with enable_fp_fusion=False, so that no product and sum become
one fused operation, and mind that Triton's `/` is not correctly rounded (tl.div_rn is) and that it has no rint.

The update kernels serve many tensors in one launch. They are told about them by a table, int64 [tensors, FIELDS]: a
program finds the tensor its number falls into by the column FIRST, which counts the programs of the tensors before.

Loops here have bounds that are known when a kernel is compiled: Triton 3.6's interpreter cannot make a Python int of
a run-time bound with numpy 2.4.
"""

import triton
import triton.language as tl

ONE = tl.constexpr(65536.0)  # one unit in fixed point: 16 bits of fraction
INFINITE = tl.constexpr(0x7F800000)  # bits of +infinity; above it lie the NaNs
LIMIT = tl.constexpr(127)  # of the momentum; a register can be asked to move by twice as much
FLOOR, CEILING = tl.constexpr(-126), tl.constexpr(120)  # of its exponents

SIGN = tl.constexpr(-0x80000000)
# The first bits behind the point of 2**(n/8) as a bfloat16, a byte each: n = 0 … 3, and n = 4 … 7.
EIGHTHS, LATER_EIGHTHS = tl.constexpr(0x26180C00), tl.constexpr(0x6B574535)

# Columns of the tables. Addresses are byte addresses; DECAY and FACTOR are the bits of a float32.
FIELDS = tl.constexpr(10)
FIRST, KEY_FIRST, KEY_SECOND = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
MOMENTUM, EXPONENT, GRAD, DECAY = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
ROWS, COLUMNS, FIRST_ROW = tl.constexpr(7), tl.constexpr(8), tl.constexpr(9)  # FIRST_ROW: of all rows of all tensors
REGISTER, DIRECTION, FACTOR, COUNT = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)


@triton.jit
def float_of(bits):
    """The float32 whose bits are `bits`."""
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(exponent):
    """2**exponent as float32, exact, for exponents of normal numbers."""
    return float_of((exponent + 127) << 23)


@triton.jit
def scale_of(exponent):
    """The scale that an exponent (int32, of int8) stands for: bf16(2**(exponent / 8)), the bits of `scale_table`."""
    eighths = tl.where((exponent & 4) == 0, EIGHTHS, LATER_EIGHTHS)
    fraction = (eighths >> ((exponent & 3) << 3)) & 0x7F
    return float_of((((exponent >> 3) + 127) << 23) | (fraction << 16))


@triton.jit
def fixed_point(x, limit):
    """x, scaled already, rounded half to even and clamped to +-limit (floats of up to 2**24), as int32."""
    size = tl.abs(x)
    # From 2**23 on every float32 is an integer; below, adding 2**23 leaves no room for a fraction.
    size = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
    x = tl.where(x < 0, 0.0 - size, size)
    x = tl.where(x < -limit, -limit, x)  # not a minimum: a NaN passes, as it does in torch
    return tl.where(x > limit, limit, x).to(tl.int32)


@triton.jit
def random_bits(index, first, second):
    """The 16 random bits of element `index` (uint32, flat) under the key, as uint32."""
    x = (index >> 1) * 0x9E3779B1 + first.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15) ^ second.to(tl.uint32)) * 0xD35A2D97
    x = x ^ (x >> 15)
    return (x >> ((index & 1) << 4)) & 0xFFFF


@triton.jit
def round_with(fixed, bits):
    """floor((fixed + u) / 65536), u being the 16 bits as the reference takes them."""
    # The reference adds the half as a signed number and then 32768: flipping its highest bit does both.
    return (fixed + (bits ^ 0x8000).to(tl.int32)) >> 16


@triton.jit
def round_stochastic(fixed, index, first, second):
    """`fixed` rounded with the random bits of the elements `index` (uint32, flat) under the key."""
    return round_with(fixed, random_bits(index, first, second))


@triton.jit
def find(table, tensors, TENSORS: tl.constexpr):
    """The table's line of the tensor that this program works on. TENSORS: a power of two of at least `tensors`."""
    number = tl.arange(0, TENSORS)
    first = tl.load(table + number * FIELDS + FIRST, mask=number < tensors, other=0x7FFFFFFF)
    return tl.sum((first <= tl.program_id(0)).to(tl.int32)) - 1


@triton.jit
def address(field, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer to `dtype` that a field of a table holds; ALIGNED: to 16 bytes, so that loads can be wide."""
    pointer = tl.load(field).to(tl.pointer_type(dtype))  # pyright: ignore[reportArgumentType]
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def leading_trit(register):
    """The weight in a register, int32: +1 above 40, -1 below -40, else 0."""
    return (register > 40).to(tl.int32) - (register < -40).to(tl.int32)


@triton.jit
def leading_number(register, LEAD: tl.constexpr):
    """The weight in a register, int32: round(register / LEAD). Of the leading trit, LEAD 81, registers up to +-121."""
    if LEAD == 81:
        return leading_trit(register)
    r = register.to(tl.int32)
    size = (tl.abs(r) + LEAD // 2) // LEAD
    return tl.where(r < 0, -size, size)


@triton.jit
def tile_of(line, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ALIGNED: tl.constexpr):
    """Where this program's tile lies in its matrix: its first row and column, and the matrix's width."""
    columns = tl.load(line + COLUMNS).to(tl.int32)
    if ALIGNED:
        columns = tl.multiple_of(columns, 16)
    across = (columns + BLOCK_C - 1) // BLOCK_C
    tile = tl.program_id(0) - tl.load(line + FIRST).to(tl.int32)
    return tile // across * BLOCK_R, tile % across * BLOCK_C, columns


@triton.jit
def summed(line, momentum, grad, old, local, mask):
    """decay * momentum + grad of a tile; 0 outside the matrix. old: the rows' exponents."""
    kept = power_of_two(old) * float_of(tl.load(line + DECAY))
    m = tl.load(momentum + local, mask=mask, other=0).to(tl.float32)
    return m * kept[:, None] + tl.load(grad + local, mask=mask, other=0.0)


@triton.jit
def peaks(
    table,
    peak_R,
    old_R,
    refused_T,
    tensors,
    TENSORS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """First pass of accumulation: the bits of the largest |value| of each row, its old exponent, and who refuses.

    Without their sign floats order as their bits do, and a NaN lies above all. peak_R and refused_T start at zero.
    """
    which = find(table, tensors, TENSORS)
    line = table + which * FIELDS
    top, left, columns = tile_of(line, BLOCK_R, BLOCK_C, ALIGNED)
    row, column = top + tl.arange(0, BLOCK_R), left + tl.arange(0, BLOCK_C)
    rows = tl.load(line + ROWS).to(tl.int32)
    start = top.to(tl.int64) * columns
    local = tl.arange(0, BLOCK_R)[:, None] * columns + column[None, :]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    old = tl.load(address(line + EXPONENT, tl.int8, False) + row, mask=row < rows, other=0).to(tl.int32)
    momentum = address(line + MOMENTUM, tl.int8, ALIGNED) + start
    grad = address(line + GRAD, tl.float32, ALIGNED) + start
    value = summed(line, momentum, grad, old, local, mask)
    size = tl.where(mask, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    peak = tl.max(size, axis=1)
    at = tl.load(line + FIRST_ROW) + row
    tl.atomic_max(peak_R + at, peak, mask=row < rows)
    tl.store(old_R + at, old, mask=(row < rows) & (left == 0))
    if tl.max(peak, axis=0) >= INFINITE:
        tl.store(refused_T + which, 1)


@triton.jit
def requantise(
    table,
    peak_R,
    old_R,
    refused_T,
    taken_T,
    tensors,
    TENSORS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Second pass: new exponents and the rounded momentum. A tensor that was refused is left alone."""
    which = find(table, tensors, TENSORS)
    line = table + which * FIELDS
    top, left, columns = tile_of(line, BLOCK_R, BLOCK_C, ALIGNED)
    taken = tl.load(refused_T + which) == 0
    if (top == 0) & (left == 0):
        tl.store(taken_T + which, taken.to(tl.int8))
    if taken:
        row, column = top + tl.arange(0, BLOCK_R), left + tl.arange(0, BLOCK_C)
        rows = tl.load(line + ROWS).to(tl.int32)
        start = top.to(tl.int64) * columns
        local = tl.arange(0, BLOCK_R)[:, None] * columns + column[None, :]
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        at = tl.load(line + FIRST_ROW) + row
        old = tl.load(old_R + at, mask=row < rows, other=0)
        peak = tl.load(peak_R + at, mask=row < rows, other=0)
        # What frexp says of peak / 127; zeros and subnormals come out at the floor.
        ratio = tl.div_rn(float_of(peak), 127.0)
        exponent = (ratio.to(tl.int32, bitcast=True) >> 23) - 126
        exponent = tl.minimum(tl.maximum(exponent, FLOOR), CEILING)
        new = address(line + EXPONENT, tl.int8, False) + row
        tl.store(new, exponent.to(tl.int8), mask=(row < rows) & (left == 0))
        momentum = address(line + MOMENTUM, tl.int8, ALIGNED) + start
        grad = address(line + GRAD, tl.float32, ALIGNED) + start
        value = summed(line, momentum, grad, old, local, mask) * power_of_two(-exponent)[:, None]
        index = start.to(tl.uint32) + local.to(tl.uint32)
        key_first, key_second = tl.load(line + KEY_FIRST), tl.load(line + KEY_SECOND)
        step = round_stochastic(fixed_point(value * ONE, LIMIT * ONE), index, key_first, key_second)
        tl.store(momentum + local, step.to(tl.int8), mask=mask)


@triton.jit
def move(
    table,
    go,
    flips_T,
    limit,
    tensors,
    TENSORS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """register <- clamp(register + round(factor * direction)), and how many leading trits changed. go: may be None."""
    moves = True
    if go is not None:
        moves = tl.load(go)
    if moves:
        which = find(table, tensors, TENSORS)
        line = table + which * FIELDS
        count = tl.load(line + COUNT)
        if ALIGNED:
            count = tl.multiple_of(count, 16)
        start = (tl.program_id(0) - tl.load(line + FIRST)) * BLOCK
        local = tl.arange(0, BLOCK)
        mask = start + local < count
        direction = address(line + DIRECTION, tl.float32, ALIGNED) + start
        scaled = tl.load(direction + local, mask=mask, other=0.0) * float_of(tl.load(line + FACTOR))
        fixed = fixed_point(scaled, 2 * LIMIT * ONE)
        index = start.to(tl.uint32) + local.to(tl.uint32)
        step = round_stochastic(fixed, index, tl.load(line + KEY_FIRST), tl.load(line + KEY_SECOND))
        step = tl.minimum(tl.maximum(step, -2 * limit), 2 * limit)
        register = address(line + REGISTER, tl.int8, ALIGNED) + start
        before = tl.load(register + local, mask=mask, other=0).to(tl.int32)
        after = tl.minimum(tl.maximum(before + step, -limit), limit)
        tl.store(register + local, after.to(tl.int8), mask=mask)
        flipped = mask & (leading_trit(before) != leading_trit(after))
        tl.atomic_add(flips_T + which, tl.sum(flipped.to(tl.int32)).to(tl.int64))


@triton.jit
def weight_of(register, scale, LEAD: tl.constexpr):
    """round(register / LEAD) * scale, float32. register: int32."""
    size = tl.abs(register)
    if LEAD == 81:
        w = tl.where(size > 121, scale + scale, tl.where(size > 40, scale, 0.0))
    else:
        w = ((size + LEAD // 2) // LEAD).to(tl.float32) * scale
    # The reference rounds a small negative register to a negative zero; so does the sign put on here.
    return float_of(w.to(tl.int32, bitcast=True) | (register & SIGN))


@triton.jit
def as_type(w, TYPE: tl.constexpr, LEAD: tl.constexpr):
    """What `weight_of` gave as TYPE, rounded half to even. Of one trit nothing is rounded; of more it is done by hand,
    as the interpreter cuts off what a bfloat16 does not hold."""
    if (LEAD != 81) & (tl.bfloat16 == TYPE):
        bits = w.to(tl.int32, bitcast=True)
        w = float_of((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536)
    return w.to(TYPE)


@triton.jit
def decode(
    ids,
    register,
    exponent,
    weight,
    rows,
    table_rows,
    columns,
    groups,
    group,
    across,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNIFORM: tl.constexpr,
    LEAD: tl.constexpr,
):
    """weight [rows, columns] = rows `ids` (None: all in order) of the matrix, round(register / LEAD) * scale.

    UNIFORM: every block of columns lies within one group. across: blocks of columns; known to be 1 when it is compiled,
    it saves a division. An id outside the table gives a row of NaN.
    """
    row = (tl.program_id(0) // across).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    left = tl.program_id(0) % across * BLOCK_C
    column = left + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    source = row
    if ids is not None:
        source = tl.load(ids + row, mask=row < rows, other=0)
    known = (source >= 0) & (source < table_rows)
    mask = inside & known[:, None]
    r = tl.load(register + source[:, None] * columns + column[None, :], mask=mask, other=0).to(tl.int32)
    if UNIFORM:
        e = tl.load(exponent + source * groups + left // group, mask=known & (row < rows), other=0).to(tl.int32)
        scale = scale_of(e)[:, None]
    else:
        at = source[:, None] * groups + (column // group)[None, :]
        scale = scale_of(tl.load(exponent + at, mask=mask, other=0).to(tl.int32))
    w = weight_of(r, scale, LEAD)
    if ids is not None:
        w = tl.where(known[:, None], w, float("nan"))
    to = weight + row[:, None] * columns + column[None, :]
    tl.store(to, as_type(w, weight.dtype.element_ty, LEAD), mask=inside)
