"""Ternary embedding: y[n] = W[ids[n]] with W as in the ternary linear, and the weight gradient through a port."""

from typing import Any

import torch
from torch import Tensor

from tritwise.ops import gpu, native
from tritwise.ops.backends import choose, implement
from tritwise.ops.embedding import cpu, reference, triton
from tritwise.ops.library import LIBRARY, define
from tritwise.registers import LEAD

implement("embedding", "reference", reference)
implement("embedding", "cpu", cpu, priority=10, devices=("cpu",), refuses=native.refuses)
implement("embedding", "triton", triton, priority=20, devices=("cuda",), refuses=gpu.refuses)


def _forward(
    ids: Tensor, register: Tensor, exponent: Tensor, group: int, port: Tensor | None, dtype: torch.dtype, lead: int
) -> Tensor:
    return choose("embedding", ids.device).forward(ids, register, exponent, group, dtype, lead)


def _weight_grad(grad: Tensor, ids: Tensor, rows: int) -> Tensor:
    return choose("embedding", grad.device).weight_grad(grad, ids, rows)


_embedding = define(
    "embedding(Tensor ids, Tensor register, Tensor exponent, int group, Tensor? port, ScalarType dtype, int lead)"
    " -> Tensor",
    _forward,
    lambda ids, register, exponent, group, port, dtype, lead: register.new_empty(
        *ids.shape, register.shape[1], dtype=dtype
    ),
)
_embedding_weight_grad = define(
    "embedding_weight_grad(Tensor grad, Tensor ids, int rows) -> Tensor",
    _weight_grad,
    lambda grad, ids, rows: grad.new_empty(rows, grad.shape[-1], dtype=torch.float32),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, register, *_ = inputs
    ctx.rows = register.shape[0]
    ctx.save_for_backward(ids)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    port_grad = _embedding_weight_grad(grad, ids, ctx.rows) if ctx.needs_input_grad[4] else None
    return None, None, None, None, port_grad, None, None


torch.library.register_autograd("tritwise::embedding", _backward, setup_context=_setup, lib=LIBRARY)


def embedding(
    ids: Tensor,
    register: Tensor,
    exponent: Tensor,
    group: int = 256,
    port: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    lead: int = LEAD,
) -> Tensor:
    """Rows of W = round(register / lead) * scale, as the ternary linear has it. ids: int64 [...]; register: int8
    [V, D]; exponent: int8 [V, ceil(D/group)] -> `dtype` [..., D]. port: receives dL/dW as float32 [V, D] in backward,
    or None."""
    return _embedding(ids, register, exponent, group, port, dtype, lead)
