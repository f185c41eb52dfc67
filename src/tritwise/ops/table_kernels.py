"""Kernels that write what only the device knows at a replay: keys of a step, and what a table of tensors says of them.

Integers have the same bits as the torch reference (registers/random.py). Imported on first use (`gpu.py`).
"""

import triton
import triton.language as tl

from tritwise.ops.triton_kernels import FACTOR, FIELDS, KEY_FIRST, KEY_SECOND


@triton.jit
def splitmix64(state):
    """One step of splitmix64 on uint64."""
    state = state + 0x9E3779B97F4A7C15
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    return state ^ (state >> 31)


@triton.jit
def keys_at(step, places, keys, count, BLOCK: tl.constexpr):
    """keys, int64 [count, 2], at the step, int64 0-d, of places, int64 [count, 3], from `rows_of_places`."""
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = number < count
    state = tl.load(places + number * 3, mask=mask, other=0).to(tl.uint64)
    state = splitmix64(state ^ tl.load(step).to(tl.uint64))
    for part in tl.static_range(1, 3):
        state = splitmix64(state ^ tl.load(places + number * 3 + part, mask=mask, other=0).to(tl.uint64))
    # Both halves as signed numbers.
    tl.store(keys + number * 2, state.to(tl.uint32).to(tl.int32, bitcast=True).to(tl.int64), mask=mask)
    tl.store(keys + number * 2 + 1, (state >> 32).to(tl.uint32).to(tl.int32, bitcast=True).to(tl.int64), mask=mask)


@triton.jit
def fill(table, rates, keys, stride, tensors, BLOCK: tl.constexpr):
    """Steps for a direction of -1, float64 `stride` apart, and keys, int64 [tensors, 2], into a table of tensors to
    move; either may be None."""
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = number < tensors
    line = table + number * FIELDS
    if rates is not None:
        factor = (tl.load(rates + number * stride, mask=mask, other=0.0) * -65536.0).to(tl.float32)
        tl.store(line + FACTOR, factor.to(tl.int32, bitcast=True).to(tl.int64), mask=mask)
    if keys is not None:
        tl.store(line + KEY_FIRST, tl.load(keys + number * 2, mask=mask, other=0), mask=mask)
        tl.store(line + KEY_SECOND, tl.load(keys + number * 2 + 1, mask=mask, other=0), mask=mask)
