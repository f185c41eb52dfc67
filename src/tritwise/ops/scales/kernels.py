"""Triton kernels that move scales; tables as those of `tritwise.ops.triton_kernels`, with columns of their own."""

import triton
import triton.language as tl

from tritwise.ops.scales import reference
from tritwise.ops.triton_kernels import FIELDS, FIRST, KEY_FIRST, KEY_SECOND, address, find, random_bits

# OCTAVES holds the bits of a float64; BEFORE counts the scales of all sets before.
SCALE, EVIDENCE, SLOPE = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
OCTAVES, SCALES, BEFORE = tl.constexpr(6), tl.constexpr(7), tl.constexpr(8)
UNITS = tl.constexpr(2048.0)  # 1/256 steps of an exponent in an octave
MOST = tl.constexpr(65024.0)  # of them, in either direction, at a step
LIMIT = tl.constexpr(32512)  # 127 exponents
FAR = tl.constexpr(reference.FAR)
TINY = tl.constexpr(1e-30)  # keeps a zero momentum at zero
WHOLE = tl.constexpr(6755399441055744.0)  # 1.5 * 2**52: added to a float64 below 2**51 it leaves no room for a fraction


@triton.jit
def scale_squares(table, square_T, tensors, TENSORS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of squares of each set's momentum: exact, for it is a sum of integers. square_T starts at zero."""
    which = find(table, tensors, TENSORS)
    line = table + which * FIELDS
    at = (tl.program_id(0) - tl.load(line + FIRST)) * BLOCK + tl.arange(0, BLOCK)
    m = tl.load(address(line + SLOPE, tl.int8, False) + at, mask=at < tl.load(line + SCALES), other=0).to(tl.int32)
    tl.atomic_add(square_T + which, tl.sum(m * m).to(tl.int64))


@triton.jit
def move_scales(table, square_T, still, go, octaves, keys, tensors, TENSORS: tl.constexpr, BLOCK: tl.constexpr):
    """Exponents and evidence of all sets. still, go: may be None. octaves, float64 [tensors], and keys, int64
    [tensors, 2]: in place of the table's, or None."""
    moves = True
    if go is not None:
        moves = tl.load(go)
    if moves:
        which = find(table, tensors, TENSORS)
        line = table + which * FIELDS
        count = tl.load(line + SCALES)
        at = (tl.program_id(0) - tl.load(line + FIRST)) * BLOCK + tl.arange(0, BLOCK)
        mask = at < count
        mean = tl.div_rn(tl.load(square_T + which).to(tl.float32), count.to(tl.float32))
        rms = tl.sqrt_rn(mean) + TINY
        m = tl.load(address(line + SLOPE, tl.int8, False) + at, mask=mask, other=0).to(tl.float32)
        u = tl.minimum(tl.maximum(tl.div_rn(m, rms), -FAR), FAR)
        if still is not None:
            stays = tl.load(still + tl.load(line + BEFORE) + at, mask=mask, other=0)
            u = tl.where(stays != 0, 0.0, u)
        if octaves is not None:
            rate = tl.load(octaves + which)
        else:
            rate = tl.load(line + OCTAVES).to(tl.float64, bitcast=True)
        if keys is not None:
            first, second = tl.load(keys + which * 2), tl.load(keys + which * 2 + 1)
        else:
            first, second = tl.load(line + KEY_FIRST), tl.load(line + KEY_SECOND)
        x = u.to(tl.float64) * (rate * -UNITS)
        x = tl.where(x < -MOST, -MOST, x)
        x = tl.where(x > MOST, MOST, x) * 65536.0
        bits = random_bits(at.to(tl.uint32), first, second)
        steps = (((x + WHOLE) - WHOLE).to(tl.int64) + (bits ^ 0x8000).to(tl.int64)) >> 16
        exponent = address(line + SCALE, tl.int8, False) + at
        evidence = address(line + EVIDENCE, tl.int8, False) + at
        total = tl.load(exponent, mask=mask, other=0).to(tl.int64) * 256
        total += tl.load(evidence, mask=mask, other=0).to(tl.int64) + steps
        total = tl.minimum(tl.maximum(total, -LIMIT), LIMIT)
        whole = (total + 128) >> 8
        tl.store(exponent, whole.to(tl.int8), mask=mask)
        tl.store(evidence, (total - whole * 256).to(tl.int8), mask=mask)
