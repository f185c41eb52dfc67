"""What the experts of a mixture made, weighed and added up: y[n] = sum over k of gate[n, k] * x[slot[n, k]].

Shape suffixes: x_SC rows that experts made, in any order; slot_NK int64, where those of token n lie; gate_NK floats.
No row of x belongs to two tokens, so that backward needs no sum over tokens and has the same bits every time.
"""

from typing import Any

import torch
from torch import Tensor

from tritwise.ops import gpu
from tritwise.ops.backends import choose, implement
from tritwise.ops.combine import reference, triton
from tritwise.ops.library import LIBRARY, define

implement("combine", "reference", reference)
implement("combine", "triton", triton, priority=20, devices=("cuda",), refuses=gpu.refuses)


def _forward(x: Tensor, slot: Tensor, gate: Tensor) -> Tensor:
    return choose("combine", x.device).forward(x, slot, gate)


def _grads(grad: Tensor, x: Tensor, slot: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return choose("combine", x.device).backward(grad, x, slot, gate)


_combine = define(
    "combine(Tensor x, Tensor slot, Tensor gate) -> Tensor",
    _forward,
    lambda x, slot, gate: x.new_empty(slot.shape[0], x.shape[1]),
)
_combine_grads = define(
    "combine_grads(Tensor grad, Tensor x, Tensor slot, Tensor gate) -> (Tensor, Tensor)",
    _grads,
    lambda grad, x, slot, gate: (x.new_empty(x.shape), gate.new_empty(gate.shape)),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x_grad, gate_grad = _combine_grads(grad, *ctx.saved_tensors)
    return x_grad, None, gate_grad


torch.library.register_autograd("tritwise::combine", _backward, setup_context=_setup, lib=LIBRARY)


def combine(x: Tensor, slot: Tensor, gate: Tensor) -> Tensor:
    """y[n] = sum over k of gate[n, k] * x[slot[n, k]]. x: float [S, C]; slot: int64 [N, K], no row of x twice;
    gate: float [N, K] -> x's dtype [N, C]."""
    return _combine(x, slot, gate)
