"""Queries and keys of attention, normalised and turned by their positions, out of what the projection gave; one pass.

parts [B, T, H + 2K, D] holds H heads of queries, then K of keys, then K of values. Heads of queries and keys are
divided by the root of their mean square, and the halves (a, b) of each are turned by its position's angle:

    (a, b) -> (a cos - b sin, b cos + a sin)

The gradient takes those of queries, keys and values together and gives that of parts, with nothing kept but parts.
Written as torch's own operations, normalised heads are kept too, and three gradients are padded and added up.

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
