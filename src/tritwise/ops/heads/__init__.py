"""What stands before and behind attention: each one pass on a GPU.

Queries and keys, normalised and turned by their positions, out of what the projection gave:

parts [B, T, H + 2K, D] holds H heads of queries, then K of keys, then K of values. Heads of queries and keys are
divided by the root of their mean square, and the halves (a, b) of each are turned by its position's angle:

    (a, b) -> (a cos - b sin, b cos + a sin)

The gradient takes those of queries, keys and values together and gives that of parts, with nothing kept but parts.
Written as torch's own operations, normalised heads are kept too, and three gradients are padded and added up.

What attention found, without what a position knows of itself (exclusive attention): y [B, T, H, D] is brought to unit
RMS over all heads of a position, and each head loses its part along the position's own value v [B, T, K, D]:

    n = y / rms(y)      left = n - (n·v) v / max(v·v, EPS)

Shape suffixes: B batch, T time, H heads, K key-value heads, P all of them, D size of a head, F half of it.
"""

import torch
from torch import Tensor

from tritwise.ops import gpu
from tritwise.ops.backends import choose, implement
from tritwise.ops.heads import reference, triton
from tritwise.ops.library import define

implement("heads", "reference", reference)
implement("heads", "triton", triton, priority=20, devices=("cuda",), refuses=gpu.refuses)


def _forward(parts: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    return choose("heads", parts.device).forward(parts, cos, sin, heads)


def _backward(q_grad: Tensor, k_grad: Tensor, v_grad: Tensor, parts: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return choose("heads", parts.device).backward(q_grad, k_grad, v_grad, parts, cos, sin)


def _shapes(parts: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    batch, time, every, size = parts.shape
    return tuple(parts.new_empty(batch, time, count, size) for count in (heads, (every - heads) // 2))  # type: ignore[return-value]


_turned_heads = define(
    "turned_heads(Tensor parts, Tensor cos, Tensor sin, int heads) -> (Tensor, Tensor)", _forward, _shapes
)
_turned_heads_grad = define(
    "turned_heads_grad(Tensor q_grad, Tensor k_grad, Tensor v_grad, Tensor parts, Tensor cos, Tensor sin) -> Tensor",
    _backward,
    lambda q_grad, k_grad, v_grad, parts, cos, sin: torch.empty_like(parts, memory_format=torch.contiguous_format),
)


def turned_heads(parts: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Queries [B, T, H, D] and keys [B, T, K, D] of parts' dtype. parts: float [B, T, H + 2K, D], D even; cos, sin:
    float32 [T, D/2] of the positions; heads: H. No gradient is recorded: `nn.Attention` does that."""
    return _turned_heads(parts, cos, sin, heads)


def turned_heads_grad(
    q_grad: Tensor, k_grad: Tensor, v_grad: Tensor, parts: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """dL/dparts of parts' dtype, for the gradients of queries [B, T, H, D], keys and values [B, T, K, D]."""
    return _turned_heads_grad(q_grad, k_grad, v_grad, parts, cos, sin)


_without_own = define(
    "without_own(Tensor y, Tensor v, Tensor? scale) -> Tensor",
    lambda y, v, scale: choose("heads", y.device).without_own(y, v, scale),
    lambda y, v, scale: y.new_empty(*y.shape[:2], y.shape[2] * y.shape[3]),
)
_without_own_grad = define(
    "without_own_grad(Tensor grad, Tensor y, Tensor v, Tensor? scale) -> (Tensor, Tensor)",
    lambda grad, y, v, scale: choose("heads", y.device).without_own_grad(grad, y, v, scale),
    lambda grad, y, v, scale: tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (y, v)),
)


def without_own(y: Tensor, v: Tensor, scale: Tensor | None = None) -> Tensor:
    """What is left of y, of its dtype [B, T, H * D]. y: float [B, T, H, D]; v: float [B, T, K, D], K dividing H; scale:
    what each column is multiplied by at last, of y's dtype [H * D], which gets no gradient, or None. No gradient is
    recorded: `nn.Attention` does that."""
    return _without_own(y, v, scale)


def without_own_grad(grad: Tensor, y: Tensor, v: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """dL/dy and dL/dv, of their dtypes and shapes, for dL/dleft [B, T, H * D]."""
    return _without_own_grad(grad, y, v, scale)
