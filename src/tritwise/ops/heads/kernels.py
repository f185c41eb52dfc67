"""Queries, keys and what attention found, on a GPU. Imported on first use, as `tritwise.ops.triton_kernels` is."""

import triton
import triton.language as tl

from tritwise.ops.activation import reference

EPS = tl.constexpr(reference.EPS)


@triton.jit
def turned_heads(qkv, cos, sin, q, k, time, heads, kv_heads, half, ROWS: tl.constexpr, HALF: tl.constexpr):
    """The heads of queries and keys of one position, normalised and turned, in float32."""
    position = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, HALF)[None, :]
    size, within = 2 * half, column < half
    inside = (row < heads + kv_heads) & within
    at = qkv + position * (heads + 2 * kv_heads) * size + row * size + column
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(a * a + b * b, axis=1) / size + EPS)[:, None]
    a, b = a * inverse, b * inverse
    angle = position % time * half + column
    c, s = tl.load(cos + angle, mask=within, other=0.0), tl.load(sin + angle, mask=within, other=0.0)
    first, second = a * c - b * s, b * c + a * s
    to_q = q + (position * heads + row) * size + column
    tl.store(to_q, first.to(q.dtype.element_ty), mask=inside & (row < heads))
    tl.store(to_q + half, second.to(q.dtype.element_ty), mask=inside & (row < heads))
    to_k = k + (position * kv_heads + row - heads) * size + column
    tl.store(to_k, first.to(k.dtype.element_ty), mask=inside & (row >= heads))
    tl.store(to_k + half, second.to(k.dtype.element_ty), mask=inside & (row >= heads))


@triton.jit
def turned_heads_grad(
    q_grad,
    k_grad,
    v_grad,
    qkv,
    cos,
    sin,
    out,
    time,
    heads,
    kv_heads,
    half,
    q_batch,
    q_time,
    q_head,
    k_batch,
    k_time,
    k_head,
    v_batch,
    v_time,
    v_head,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
    HALF: tl.constexpr,
):
    """The gradient of all parts of one position. Three strides for each gradient, whose last is 1."""
    position = tl.program_id(0).to(tl.int64)
    batch, step = position // time, position % time
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, HALF)[None, :]
    size, within = 2 * half, column < half
    is_q, is_k = (row < heads) & within, (row >= heads) & (row < heads + kv_heads) & within
    here = position * (heads + 2 * kv_heads) * size
    at = here + row * size + column
    a = tl.load(qkv + at, mask=is_q | is_k, other=0.0).to(tl.float32)
    b = tl.load(qkv + at + half, mask=is_q | is_k, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(a * a + b * b, axis=1) / size + EPS)[:, None]
    a, b = a * inverse, b * inverse
    angle = step * half + column
    c, s = tl.load(cos + angle, mask=within, other=0.0), tl.load(sin + angle, mask=within, other=0.0)
    from_q = q_grad + batch * q_batch + step * q_time + row * q_head + column
    from_k = k_grad + batch * k_batch + step * k_time + (row - heads) * k_head + column
    # Each row is of one of the two, and of the other a zero.
    f = tl.load(from_q, mask=is_q, other=0.0).to(tl.float32) + tl.load(from_k, mask=is_k, other=0.0).to(tl.float32)
    g = tl.load(from_q + half, mask=is_q, other=0.0).to(tl.float32)
    g += tl.load(from_k + half, mask=is_k, other=0.0).to(tl.float32)
    u, w = f * c + g * s, g * c - f * s
    mean = (tl.sum(u * a + w * b, axis=1) / size)[:, None]
    tl.store(out + at, ((u - a * mean) * inverse).to(out.dtype.element_ty), mask=is_q | is_k)
    tl.store(out + at + half, ((w - b * mean) * inverse).to(out.dtype.element_ty), mask=is_q | is_k)
    value = tl.arange(0, VALUES)[:, None]
    inside = (value < kv_heads) & within
    from_v = v_grad + batch * v_batch + step * v_time + value * v_head + column
    to = out + here + (heads + kv_heads + value) * size + column
    tl.store(to, tl.load(from_v, mask=inside, other=0.0).to(out.dtype.element_ty), mask=inside)
    tl.store(to + half, tl.load(from_v + half, mask=inside, other=0.0).to(out.dtype.element_ty), mask=inside)


@triton.jit
def heads_at(x, position, time, x_batch, x_time, x_head, row, column, inside):
    """The heads of one position as float32, by three strides, the last dimension's being 1."""
    at = x + position // time * x_batch + position % time * x_time + row * x_head + column
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def without_own(
    y,
    v,
    scale,
    out,
    time,
    heads,
    numbers,
    y_batch,
    y_time,
    y_head,
    v_batch,
    v_time,
    v_head,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Of one position: y normalised over all heads, less its part along v in each head, times scale, in float32. Three
    strides for y and v, whose last is 1."""
    position = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, SIZE)[None, :]
    inside, here = (row < heads) & (column < numbers), row * numbers + column
    x = heads_at(y, position, time, y_batch, y_time, y_head, row, column, inside)
    own = heads_at(v, position, time, v_batch, v_time, v_head, row, column, inside)
    n = x / tl.sqrt_rn(tl.sum(x * x) / (heads * numbers) + EPS)
    along = tl.sum(n * own, axis=1) / tl.maximum(tl.sum(own * own, axis=1), EPS)
    left = n - along[:, None] * own
    if scale is not None:
        left *= tl.load(scale + here, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + position * heads * numbers + here, left.to(out.dtype.element_ty), mask=inside)


@triton.jit
def without_own_grad(
    grad,
    y,
    v,
    scale,
    y_grad,
    v_grad,
    time,
    heads,
    numbers,
    y_batch,
    y_time,
    y_head,
    v_batch,
    v_time,
    v_head,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The gradients of y and v of one position, each [position, heads, numbers], for that of `without_own`."""
    position = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, SIZE)[None, :]
    inside, here = (row < heads) & (column < numbers), row * numbers + column
    at = position * heads * numbers + here
    x = heads_at(y, position, time, y_batch, y_time, y_head, row, column, inside)
    own = heads_at(v, position, time, v_batch, v_time, v_head, row, column, inside)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        g *= tl.load(scale + here, mask=inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(x * x) / (heads * numbers) + EPS)
    n, square = x * inverse, tl.sum(own * own, axis=1)
    length = tl.maximum(square, EPS)
    along, of_g = tl.sum(n * own, axis=1) / length, tl.sum(g * own, axis=1) / length
    bend = tl.where(square > EPS, 2.0 * along * of_g, 0.0)
    found = bend[:, None] * own - along[:, None] * g - of_g[:, None] * n
    tl.store(v_grad + at, found.to(v_grad.dtype.element_ty), mask=inside)
    left = g - of_g[:, None] * own
    mean = tl.sum(left * n) / (heads * numbers)
    tl.store(y_grad + at, ((left - n * mean) * inverse).to(y_grad.dtype.element_ty), mask=inside)
