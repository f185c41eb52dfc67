"""Message passing over a graph: rows of x travel along edges and are added up where they arrive.

Shape suffixes: x_NC what is sent, E edges, R rows that receive, C channels. source and target are int64 [E]; an edge
whose source or target is below 0 does not exist, so that a graph may keep a fixed size. A sum is taken in the order of
the edges. Gradients travel along the same edges, backwards.
"""

from typing import Any

import torch
from torch import Tensor

from tritwise.ops import gpu
from tritwise.ops.backends import choose, implement
from tritwise.ops.graph import reference, triton
from tritwise.ops.library import LIBRARY, define

implement("graph", "reference", reference)
implement("graph", "triton", triton, priority=20, devices=("cuda",), refuses=gpu.refuses)


def _run_edge_sum(x: Tensor, source: Tensor, target: Tensor, rows: int) -> Tensor:
    return choose("graph", x.device).edge_sum(x, source, target, rows)


def _run_gather_add(base: Tensor, x: Tensor, index: Tensor) -> Tensor:
    return choose("graph", x.device).gather_add(base, x, index)


_edge_sum = define(
    "edge_sum(Tensor x, Tensor source, Tensor target, SymInt rows) -> Tensor",
    _run_edge_sum,
    lambda x, source, target, rows: x.new_empty(rows, x.shape[1]),
)
_gather_add = define(
    "gather_add(Tensor base, Tensor x, Tensor index) -> Tensor",
    _run_gather_add,
    lambda base, x, index: torch.empty_like(base, memory_format=torch.contiguous_format),
)


def _setup_edge_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, source, target, _ = inputs
    ctx.rows = x.shape[0]
    ctx.save_for_backward(source, target)


def _backward_edge_sum(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    source, target = ctx.saved_tensors
    return _edge_sum(grad, target, source, ctx.rows), None, None, None


def _setup_gather_add(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, index = inputs
    ctx.rows, ctx.dtype = x.shape[0], x.dtype
    ctx.save_for_backward(index)


def _backward_gather_add(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (index,) = ctx.saved_tensors
    received = torch.arange(len(index), device=index.device)
    x_grad = _edge_sum(grad.to(ctx.dtype), received, index, ctx.rows) if ctx.needs_input_grad[1] else None
    return grad, x_grad, None


torch.library.register_autograd("tritwise::edge_sum", _backward_edge_sum, setup_context=_setup_edge_sum, lib=LIBRARY)
torch.library.register_autograd(
    "tritwise::gather_add", _backward_gather_add, setup_context=_setup_gather_add, lib=LIBRARY
)


def edge_sum(x: Tensor, source: Tensor, target: Tensor, rows: int) -> Tensor:
    """y[r] = sum of x[source[e]] over the edges e with target[e] = r. x: float [N, C] -> x's dtype [rows, C]."""
    return _edge_sum(x, source, target, rows)


def gather_add(base: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """base[r] + x[index[r]]: the case of one edge, at the most, to every row. base: [R, C]; x: [N, C]; index: int64
    [R], below 0 for none -> base's dtype [R, C]."""
    return _gather_add(base, x, index)
