"""Products of rows that lie in runs, each run with a matrix of its own: what the experts of a mixture compute.

How many rows a run has is known on the device alone, so nothing waits, and steps can be compiled and recorded. On a GPU
with bfloat16 it is torch's grouped product; with other types every matrix reads all rows, which costs as many products
as there are matrices.

Shape suffixes: S rows, E matrices, O outputs, I inputs; ends_E int32, where each run ends, so that row s belongs to the
first e with s < ends[e], and ends[-1] = S.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritwise.ops import gpu
from tritwise.ops.backends import choose
from tritwise.ops.library import LIBRARY, define
from tritwise.ops.linear.decoded import decode_many
from tritwise.registers import LEAD, scale_values

_grouped_mm = torch.ops.aten._grouped_mm.default
ALIGNED = 8  # numbers of bfloat16 in 16 bytes, of which rows and columns of matrices must be multiples


def _is_grouped(x: Tensor, *sizes: int) -> bool:
    """Whether torch's grouped product can take x and matrices of the same type of these sizes."""
    if not x.is_cuda or x.dtype is not torch.bfloat16 or any(size % ALIGNED for size in sizes):
        return False
    return torch.cuda.get_device_capability(x.device) >= gpu.BFLOAT16


def _runs(ends_E: Tensor, rows: int) -> Tensor:
    """Whether each row is of each run: bool [E, S, 1]."""
    number_S = torch.arange(rows, device=ends_E.device)
    starts_E = torch.cat((ends_E.new_zeros(1), ends_E[:-1]))
    return ((number_S >= starts_E[:, None]) & (number_S < ends_E[:, None]))[..., None]


def _product(x_SI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    if _is_grouped(x_SI, *weight_EOI.shape[1:]):
        return _grouped_mm(x_SI, weight_EOI.mT, ends_E)
    if x_SI.is_cuda:
        runs = zip(_runs(ends_E, len(x_SI)), weight_EOI, strict=True)
        return torch.stack([torch.nn.functional.linear(x_SI, w) * own.to(x_SI.dtype) for own, w in runs]).sum(0)
    parts = x_SI.tensor_split(ends_E[:-1].cpu().long())
    return torch.cat([torch.nn.functional.linear(x, w) for x, w in zip(parts, weight_EOI, strict=True)])


def _weight_grad(grad_SO: Tensor, x_SI: Tensor, ends_E: Tensor) -> Tensor:
    if _is_grouped(x_SI, grad_SO.shape[1], x_SI.shape[1]):
        made_EOI = _grouped_mm(grad_SO.mT, x_SI, ends_E)
        counts_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1))
        return made_EOI.masked_fill_((counts_E == 0)[:, None, None], 0)  # else whatever lay there
    if x_SI.is_cuda:
        return torch.stack([(grad_SO * own.to(grad_SO.dtype)).mT @ x_SI for own in _runs(ends_E, len(x_SI))])
    places = ends_E[:-1].cpu().long()
    parts = zip(grad_SO.tensor_split(places), x_SI.tensor_split(places), strict=True)
    return torch.stack([grad.mT @ x for grad, x in parts])


_grouped_product = define(
    "grouped_product(Tensor x, Tensor weight, Tensor ends) -> Tensor",
    _product,
    lambda x, weight, ends: x.new_empty(x.shape[0], weight.shape[1]),
)
_grouped_weight_grad = define(
    "grouped_weight_grad(Tensor grad, Tensor x, Tensor ends) -> Tensor",
    _weight_grad,
    lambda grad, x, ends: x.new_empty(ends.shape[0], grad.shape[1], x.shape[1]),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, ends = ctx.saved_tensors
    x_grad = _grouped_product(grad, weight.mT, ends) if ctx.needs_input_grad[0] else None
    weight_grad = _grouped_weight_grad(grad, x, ends) if ctx.needs_input_grad[1] else None
    return x_grad, weight_grad, None


torch.library.register_autograd("tritwise::grouped_product", _backward, setup_context=_setup, lib=LIBRARY)


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each row of x times the transpose of its run's matrix. x: float [S, I]; weight: of its dtype [E, O, I]; ends:
    int32 [E] -> [S, O]."""
    return _grouped_product(x, weight, ends)


def _stacked(
    registers: list[Tensor],
    exponents: list[Tensor],
    groups: list[int],
    columns: list[Tensor],
    ports: list[Tensor],
    dtype: torch.dtype,
    leads: list[int],
) -> Tensor:
    never = [(False, False)] * len(registers)
    operands = decode_many(registers, exponents, groups, dtype, never, leads=leads)
    decode = choose("linear", registers[0].device).decode
    weights = [
        # Of a backend that decodes within its products there are none.
        decode(register, exponent, group, dtype, lead) if made.weight is None else made.weight
        for made, register, exponent, group, lead in zip(operands, registers, exponents, groups, leads, strict=True)
    ]
    stack_EOI = torch.stack(weights)
    return stack_EOI.mul_(_scales(columns).to(dtype)) if columns else stack_EOI


def _scales(columns: list[Tensor]) -> Tensor:
    """Of columns of several matrices by their exponents: float32 [E, 1, I]."""
    return scale_values(torch.stack(columns))[:, None]


def _stacked_grad(grad_EOI: Tensor, columns: list[Tensor]) -> list[Tensor]:
    # Of W, where the product was with W times the scales of its columns.
    wide_EOI = grad_EOI.float()
    if columns:
        wide_EOI = wide_EOI * _scales(columns)
    return [part.clone() for part in wide_EOI.unbind()]


_stacked_weights = define(
    "stacked_weights(Tensor[] registers, Tensor[] exponents, int[] groups, Tensor[] columns, Tensor[] ports, "
    "ScalarType dtype, int[] leads) -> Tensor",
    _stacked,
    lambda registers, exponents, groups, columns, ports, dtype, leads: torch.empty(
        (len(registers), *registers[0].shape), dtype=dtype, device=registers[0].device
    ),
)
_stacked_weights_grad = define(
    "stacked_weights_grad(Tensor grad, Tensor[] columns) -> Tensor[]",
    _stacked_grad,
    lambda grad, columns: [grad.new_empty(grad.shape[1:], dtype=torch.float32) for _ in range(grad.shape[0])],
)


def _setup_stacked(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[3])
    ctx.lengths = [len(inputs[place]) for place in (0, 1, 3)]


def _backward_stacked(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    made = _stacked_weights_grad(grad, list(ctx.saved_tensors))
    wanted = ctx.needs_input_grad[4]
    registers, exponents, columns = ([None] * length for length in ctx.lengths)
    ports = [grad if wants else None for grad, wants in zip(made, wanted, strict=True)]
    return registers, exponents, None, columns, ports, None, None


torch.library.register_autograd(
    "tritwise::stacked_weights", _backward_stacked, setup_context=_setup_stacked, lib=LIBRARY
)


def stacked_weights(
    registers: Sequence[Tensor],
    exponents: Sequence[Tensor],
    groups: Sequence[int],
    dtype: torch.dtype,
    ports: Sequence[Tensor | None],
    columns: Sequence[Tensor] = (),
    leads: Sequence[int] = (),
) -> Tensor:
    """Ternary matrices of one shape, decoded as `dtype` [E, O, I], for `grouped_product`.

    registers: int8 [O, I] each; exponents: int8 [O, ceil(I/group)]; groups: of each; columns: exponents of the scales
    of columns, int8 [I] each, which then need not go to the inputs, or none at all. ports: what receives dL/dW of each
    in backward, as float32 [O, I], or None. leads: as of `linear`, of each; 81, if nothing is said.
    """
    # A register gets no gradient: it stands for no port.
    open_ports = [register if port is None else port for register, port in zip(registers, ports, strict=True)]
    leads = list(leads) or [LEAD] * len(registers)
    return _stacked_weights(list(registers), list(exponents), list(groups), list(columns), open_ports, dtype, leads)
