"""The Triton kernel that decodes many ternary matrices in one launch, for products in float and in float8.

Of its table, as in `tritwise.ops.triton_kernels`, addresses that are 0 are not written to.
"""

import torch
import triton
import triton.language as tl

from tritwise.ops.linear.kernels import float8_of
from tritwise.ops.triton_kernels import FIELDS, ROWS, address, as_type, find, scale_of, tile_of, weight_of

REGISTER, EXPONENT, WEIGHT = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # addresses
TRITS, TURNED, SCALE = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
# ROWS and COLUMNS lie between these.
GROUP = tl.constexpr(9)  # columns of a group: a multiple of BLOCK, or all
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def decode_many(table, tensors, TENSORS: tl.constexpr, TYPE: tl.constexpr, BLOCK: tl.constexpr, LEAD: tl.constexpr):
    """Of registers [rows, columns]: weights, round(register / LEAD) * scale, as TYPE, leading trits as bytes of float8
    e4m3, those as [columns, rows], and the float32 scale of each row of a single group. Addresses and columns are
    multiples of 16, and so are the rows of what is turned."""
    line = table + find(table, tensors, TENSORS) * FIELDS
    top, left, columns = tile_of(line, BLOCK, BLOCK, True)
    rows, group = tl.load(line + ROWS).to(tl.int32), tl.load(line + GROUP).to(tl.int32)
    register, exponent = address(line + REGISTER, tl.int8, True), address(line + EXPONENT, tl.int8, False)
    weight, trits = address(line + WEIGHT, TYPE, True), address(line + TRITS, tl.uint8, True)
    turned, scales = address(line + TURNED, tl.uint8, True), address(line + SCALE, tl.float32, True)
    down, across = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    row, inside = top + down, top + down < rows
    mask = inside[:, None] & (left + across < columns)[None, :]
    at = top.to(tl.int64) * columns + left + (down[:, None] * columns + across[None, :])
    r = tl.load(register + at, mask=mask, other=0)
    own = row.to(tl.int64) * tl.cdiv(columns, group) + left // group
    scale = scale_of(tl.load(exponent + own, mask=inside, other=0).to(tl.int32))
    if weight.to(tl.int64) != 0:
        w = weight_of(r.to(tl.int32), scale[:, None], LEAD)
        tl.store(weight + at, as_type(w, TYPE, LEAD), mask=mask)
    if trits.to(tl.int64) != 0:
        tl.store(trits + at, float8_of(r), mask=mask)
    if turned.to(tl.int64) != 0:
        rows = tl.multiple_of(rows, 16)
        to = left.to(tl.int64) * rows + top + (across[:, None] * rows + down[None, :])
        tl.store(turned + to, tl.trans(float8_of(r)), mask=tl.trans(mask))
    if (scales.to(tl.int64) != 0) & (left == 0):
        tl.store(scales + row, scale, mask=inside)
