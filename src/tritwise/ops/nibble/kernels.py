"""The arithmetic of nibble registers on a GPU. Imported on first use, as `tritwise.ops.triton_kernels` is, whose rules
hold here too: the reference's float32 operations in the reference's order, one rounding each.

A tile is BLOCK lines of 32 columns, and a line is one group of one row: what is kept for a group is one number a line.
"""

import triton
import triton.language as tl

from tritwise.ops.triton_kernels import (
    COLUMNS,
    COUNT,
    DIRECTION,
    EXPONENT,
    FACTOR,
    FIELDS,
    FIRST,
    FIRST_ROW,
    GRAD,
    INFINITE,
    KEY_FIRST,
    KEY_SECOND,
    ONE,
    REGISTER,
    ROWS,
    address,
    find,
    fixed_point,
    float_of,
    leading_trit,
    power_of_two,
    random_bits,
    round_with,
)

LIMIT = tl.constexpr(7)  # of r and m
GROUP = tl.constexpr(32)
FLOOR, CEILING = tl.constexpr(-110), tl.constexpr(124)  # of the rows' exponents
GROUP_EXPONENT = tl.constexpr(6)  # a column of the table that others use for the decay; here that is an argument
VALUE = GRAD  # what is written: where momentum goes


@triton.jit
def coarse_of(register):
    """The register r of the byte 16*r + m, both int32."""
    return (register + 8) >> 4


@triton.jit
def level_of(m):
    """What the momentum m stands for, float32: `tritwise.registers.MOMENTUM_LEVELS` with the sign of m."""
    size = tl.abs(m)
    level = tl.where(size >= 1, 0.5, 0.0) + tl.where(size >= 2, 0.625, 0.0) + tl.where(size >= 3, 0.75, 0.0)
    level += tl.where(size >= 4, 0.875, 0.0) + tl.where(size >= 5, 1.0, 0.0) + tl.where(size >= 6, 1.375, 0.0)
    level += tl.where(size >= 7, 1.875, 0.0)
    return tl.where(m < 0, -level, level)


@triton.jit
def nearest_level(value):
    """The m whose level lies nearest to the value, the one nearer to 0 where two do."""
    size = tl.abs(value)
    m = (size > 0.25).to(tl.int32) + (size > 0.8125).to(tl.int32) + (size > 1.5).to(tl.int32)
    m += (size > 2.3125).to(tl.int32) + (size > 3.25).to(tl.int32) + (size > 4.4375).to(tl.int32)
    m += (size > 6.0625).to(tl.int32)
    return tl.where(value < 0, -m, m)


@triton.jit
def random_level(value, bits):
    """The m of one of the two levels next to the value, so that their mean is the value; bits: 16 random ones."""
    size = tl.abs(value)
    low = (size >= 0.5).to(tl.int32) + (size >= 1.125).to(tl.int32) + (size >= 1.875).to(tl.int32)
    low += (size >= 2.75).to(tl.int32) + (size >= 3.75).to(tl.int32) + (size >= 5.125).to(tl.int32)
    share = (size - level_of(low)) * 65536.0
    gap = level_of(low + 1) - level_of(low)
    m = low + (share > bits.to(tl.float32) * gap).to(tl.int32)
    return tl.where(value < 0, -m, m)


@triton.jit
def unit_of(row_exponent, group_exponent, scales):
    """What a momentum of 1 means; exact while it is a normal number."""
    return power_of_two(row_exponent) * tl.load(scales + (group_exponent + 128))


@triton.jit
def eighths(peak, scales):
    """The least E for which 7 units of scales[E + 128] reach the peak, whose bits are given; very low for 0."""
    # A subnormal ratio comes out wrong here, but below every floor, as it should be.
    bits = tl.div_rn(float_of(peak), 7.0).to(tl.int32, bitcast=True)
    fraction = float_of((bits & 0x007FFFFF) | 0x3F000000)  # 0.5 … 1
    steps = tl.load(scales + 120 + tl.arange(0, 8))
    above = tl.sum((fraction[:, None] > steps[None, :]).to(tl.int32), axis=1)
    return ((bits >> 23) - 127) * 8 + above


@triton.jit
def turned(bits, turn):
    """16 random bits, moved on by the turn of the phase: a number, or where one lies."""
    if turn.dtype.is_ptr():
        turn = tl.load(turn)
    return (bits + turn.to(tl.uint32)) & 0xFFFF


@triton.jit
def lines_of(line, BLOCK: tl.constexpr):
    """The rows and groups of this program's lines, which of them there are, the matrix's groups, and its columns."""
    columns = tl.load(line + COLUMNS).to(tl.int32)
    groups = (columns + GROUP - 1) // GROUP
    number = (tl.program_id(0) - tl.load(line + FIRST).to(tl.int32)) * BLOCK + tl.arange(0, BLOCK)
    row = number // groups
    return row, number % groups, row < tl.load(line + ROWS).to(tl.int32), groups, columns


@triton.jit
def elements_of(row, group, exists, columns, ALIGNED: tl.constexpr):
    """Where the elements of these lines lie in their matrix, and which there are."""
    if ALIGNED:
        columns = tl.multiple_of(columns, 16)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    return row.to(tl.int64)[:, None] * columns + column, exists[:, None] & (column < columns)


@triton.jit
def summed(register, grad, kept):
    """decay * momentum + grad; kept: decay * the lines' units."""
    m = register - (coarse_of(register) << 4)
    return level_of(m) * kept[:, None] + grad


@triton.jit
def old_units(line, row, group, exists, groups, scales):
    """The units of these lines as the exponents in memory say."""
    p = tl.load(address(line + EXPONENT, tl.int8, False) + row, mask=exists, other=0).to(tl.int32)
    at = row.to(tl.int64) * groups + group
    e = tl.load(address(line + GROUP_EXPONENT, tl.int8, False) + at, mask=exists, other=0).to(tl.int32)
    return unit_of(p, e, scales)


@triton.jit(do_not_specialize=["decay"])
def peaks(
    table,
    scales,
    peak_R,
    peak_L,
    kept_L,
    refused_T,
    decay,
    tensors,
    TENSORS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """First pass of accumulation: the bits of the largest |value| of each row and line, and who refuses.

    decay: the bits of a float32. kept_L gets decay * the old units, since the second pass writes new exponents.
    Without their sign floats order as their bits do, and a NaN lies above all. peak_R and refused_T start at zero.
    """
    which = find(table, tensors, TENSORS)
    line = table + which * FIELDS
    row, group, exists, groups, columns = lines_of(line, BLOCK)
    at, mask = elements_of(row, group, exists, columns, ALIGNED)
    kept = old_units(line, row, group, exists, groups, scales) * float_of(decay)
    register = tl.load(address(line + REGISTER, tl.int8, ALIGNED) + at, mask=mask, other=0).to(tl.int32)
    grad = tl.load(address(line + GRAD, tl.float32, ALIGNED) + at, mask=mask, other=0.0)
    size = summed(register, grad, kept).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    peak = tl.max(tl.where(mask, size, 0), axis=1)
    own = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(peak_L + own, peak)
    tl.store(kept_L + own, kept)
    tl.atomic_max(peak_R + tl.load(line + FIRST_ROW) + row, peak, mask=exists)
    if tl.max(peak, axis=0) >= INFINITE:
        tl.store(refused_T + which, 1)


@triton.jit(do_not_specialize=["turn"])
def requantise(
    table,
    scales,
    peak_R,
    peak_L,
    kept_L,
    refused_T,
    taken_T,
    turn,
    tensors,
    TENSORS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    NEAREST: tl.constexpr,
):
    """Second pass: new exponents and the rounded momentum, to the nearest level or at random. A tensor that was refused
    is left alone."""
    which = find(table, tensors, TENSORS)
    line = table + which * FIELDS
    taken = tl.load(refused_T + which) == 0
    if tl.program_id(0) == tl.load(line + FIRST):
        tl.store(taken_T + which, taken.to(tl.int8))
    if taken:
        row, group, exists, groups, columns = lines_of(line, BLOCK)
        own = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        row_peak = tl.load(peak_R + tl.load(line + FIRST_ROW) + row, mask=exists, other=0)
        p = tl.minimum(tl.maximum((eighths(row_peak, scales) + 7) >> 3, FLOOR), CEILING)
        e = tl.minimum(tl.maximum(eighths(tl.load(peak_L + own), scales) - p * 8, -127), 0)
        tl.store(address(line + EXPONENT, tl.int8, False) + row, p.to(tl.int8), mask=exists & (group == 0))
        to = address(line + GROUP_EXPONENT, tl.int8, False) + row.to(tl.int64) * groups + group
        tl.store(to, e.to(tl.int8), mask=exists)
        at, mask = elements_of(row, group, exists, columns, ALIGNED)
        where = address(line + REGISTER, tl.int8, ALIGNED) + at
        register = tl.load(where, mask=mask, other=0).to(tl.int32)
        grad = tl.load(address(line + GRAD, tl.float32, ALIGNED) + at, mask=mask, other=0.0)
        value = summed(register, grad, tl.load(kept_L + own))
        unit = tl.broadcast_to(unit_of(p, e, scales)[:, None], value.shape)
        level = tl.minimum(tl.maximum(tl.div_rn(value, unit), -7.0), 7.0)
        if NEAREST:
            m = nearest_level(level)
        else:
            bits = random_bits(at.to(tl.uint32), tl.load(line + KEY_FIRST), tl.load(line + KEY_SECOND))
            m = random_level(level, turned(bits, turn))
        tl.store(where, ((coarse_of(register) << 4) + m).to(tl.int8), mask=mask)


@triton.jit(do_not_specialize=["turn"])
def move(
    table,
    go,
    flips_T,
    turn,
    tensors,
    TENSORS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """r <- clamp(r + round(factor * direction)), and how many leading trits changed.

    go: may be None. BLOCK: elements of a program.
    """
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
        index = start.to(tl.uint32) + local.to(tl.uint32)
        bits = random_bits(index, tl.load(line + KEY_FIRST), tl.load(line + KEY_SECOND))
        step = round_with(fixed_point(scaled, 2 * LIMIT * ONE), turned(bits, turn))
        where = address(line + REGISTER, tl.int8, ALIGNED) + start + local
        before = tl.load(where, mask=mask, other=0).to(tl.int32)
        coarse = coarse_of(before)
        after = before + ((tl.minimum(tl.maximum(coarse + step, -LIMIT), LIMIT) - coarse) << 4)
        tl.store(where, after.to(tl.int8), mask=mask)
        flipped = mask & (leading_trit(before) != leading_trit(after))
        tl.atomic_add(flips_T + which, tl.sum(flipped.to(tl.int32)).to(tl.int64))


@triton.jit
def momentum_of(
    table,
    scales,
    tensors,
    TENSORS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """What the momentum nibbles stand for, written to VALUE."""
    which = find(table, tensors, TENSORS)
    line = table + which * FIELDS
    row, group, exists, groups, columns = lines_of(line, BLOCK)
    at, mask = elements_of(row, group, exists, columns, ALIGNED)
    unit = old_units(line, row, group, exists, groups, scales)
    register = tl.load(address(line + REGISTER, tl.int8, ALIGNED) + at, mask=mask, other=0).to(tl.int32)
    level = level_of(register - (coarse_of(register) << 4))
    tl.store(address(line + VALUE, tl.float32, ALIGNED) + at, level * unit[:, None], mask=mask)
