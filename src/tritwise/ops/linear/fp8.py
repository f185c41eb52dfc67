"""The ternary linear with 8-bit floats on the matrix units: forward and input gradient; the weight gradient is exact.

Trits are exact in float8 (e4m3), and a scale for each row of W stands outside of the product, so that only x and dL/dy
are rounded: to e4m3, with one float32 scale for each of their rows. Where rows of x are known to have unit RMS, as
behind a norm, the scale is a power of two with which the largest number that such a row can hold stays in the range of
e4m3: no row has to be searched for its own, and the 18 octaves of e4m3 leave enough below. Everything but the trits is
composed of torch's own operations, which a compiler fuses with what made x. Source: row-wise scaled products,
`torch._scaled_mm`.

A number of x is read and rounded once and then multiplied O times, one of dL/dy I times. On an H200 the first takes
about 1.2e-12 s, or .4e-12 s without a search, and a multiplication in float8 instead of bfloat16 saves .9e-15 s (1120
instead of 745 TFLOP/s): so either product is rounded only where the other side of the matrix is large, and is the exact
one of `linear` elsewhere.

Shape suffixes: N rows of x, I inputs, O outputs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tritwise.ops.backends import choose
from tritwise.ops.float8 import FLOAT8, rounded, times_as_float8, unit_factor
from tritwise.ops.library import define
from tritwise.ops.linear import linear
from tritwise.registers import LEAD, scale_values

_scaled_mm = torch.ops.aten._scaled_mm.default
OLDEST = (8, 9)  # compute capability with matrix units for float8
MULTIPLE = 16  # of rows and columns of W
LEAST = 1024
"""Outputs from which on x is rounded, half as many if it is of unit RMS, and inputs from which on dL/dy is: about where
that begins to pay."""


def _trits(register: Tensor, turned: bool) -> Tensor:
    return choose("linear", register.device).trits_float8(register, turned)


_trits_op = define(
    "trits_float8(Tensor register, bool turned) -> Tensor",
    _trits,
    lambda register, turned: register.new_empty(register.shape[::-1] if turned else register.shape, dtype=FLOAT8),
)


def refuses_fp8(register: Tensor, exponent: Tensor) -> str | None:
    """Why a layer cannot use `linear_fp8`, or None."""
    if exponent.shape[1] != 1:
        return "each row needs a single scale; set group=65536"
    if register.shape[0] % MULTIPLE or register.shape[1] % MULTIPLE:
        return f"rows and columns must be multiples of {MULTIPLE}, not {tuple(register.shape)}; choose another width"
    if register.is_cuda and torch.cuda.get_device_capability(register.device) < OLDEST:
        return f"{torch.cuda.get_device_name(register.device)} has no matrix units for float8; leave fp8 off"
    return None


def rounds_fp8(register: Tensor, least: int = LEAST, unit: bool = False) -> tuple[bool, bool]:
    """Whether `linear_fp8` rounds x: where there are `least` outputs or more, half as many if x is of unit RMS; and
    whether it rounds dL/dy: where there are `least` inputs. Neither where a side is too short for a matrix unit, as a
    router's."""
    outputs, inputs = register.shape
    filled = min(outputs, inputs) >= MULTIPLE
    return filled and outputs >= (least // 2 if unit else least), filled and inputs >= least


def _scales_rows_on_cpu() -> bool:
    """Whether this torch has row-wise scaled products for a CPU: 2.13 has, 2.11 has not."""
    scale, one = torch.ones(MULTIPLE), torch.ones(MULTIPLE, MULTIPLE).to(FLOAT8)
    try:
        _scaled_mm(one, one.t(), scale.view(-1, 1), scale.view(1, -1), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


_CPU_SCALES_ROWS = _scales_rows_on_cpu()  # asked here, as torch.compile does not look into what raises


def _product(a: Tensor, turned_b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    """a [N, K] times the transpose of turned_b [M, K], with scales [N, 1] and [1, M]."""
    if a.is_cpu and not _CPU_SCALES_ROWS:
        return ((a.float() @ turned_b.float().t()) * scale_a * scale_b).bfloat16().to(dtype)
    # Row-wise scaled products come out in bfloat16.
    return _scaled_mm(a, turned_b.t(), scale_a, scale_b, out_dtype=torch.bfloat16).to(dtype)


def _same(value: float, count: int, made: Tensor | None, like: Tensor) -> Tensor:
    """float32 [count] of one number: the beginning of `made`, a longer vector of it, where there is one."""
    if made is not None and count <= made.shape[0]:
        return made[:count]
    return torch.full((count,), value, dtype=torch.float32, device=like.device)


def rounded_unit(x_NI: Tensor, x8: Tensor | None = None, unit_x: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same as `rounded` for rows of about unit RMS, with one scale for all of them, a power of two: numbers beyond
    what such a row can hold, sqrt(I), may end at the largest of float8; those below 7e-5 * sqrt(I) lose digits. x8: x
    times `unit_factor(I)` as float8 [..., I], where it is there already; unit_x: a vector of the scale, likewise."""
    factor = unit_factor(x_NI.shape[1])
    x8_NI = times_as_float8(x_NI, factor) if x8 is None else x8.view(x_NI.shape)
    return x8_NI, _same(1 / factor, x_NI.shape[0], unit_x, x_NI).view(-1, 1)


def forward_fp8(
    x_NI: Tensor,
    trits8: Tensor,
    scale_O: Tensor,
    unit: bool,
    x8: Tensor | None = None,
    unit_x: Tensor | None = None,
) -> Tensor:
    """y [N, O] of x's dtype, x being rounded. trits8: float8 [O, I]; scale_O: float32; unit: x has about unit RMS; x8,
    unit_x: as of `rounded_unit`."""
    x8_NI, scale_N1 = rounded_unit(x_NI, x8, unit_x) if unit else rounded(x_NI)
    return _product(x8_NI, trits8, scale_N1, scale_O.view(1, -1), x_NI.dtype)


def input_grad_fp8(grad_NO: Tensor, turned8: Tensor, scale_O: Tensor, ones: Tensor | None = None) -> Tensor:
    """dL/dx [N, I] of dL/dy's dtype, dL/dy being rounded. turned8: float8 trits [I, O]; scale_O: float32; ones: a
    vector of them, where it is there already."""
    grad8_NO, scale_N1 = rounded(grad_NO * scale_O.to(grad_NO.dtype).view(1, -1))
    ones_1I = _same(1.0, turned8.shape[0], ones, grad_NO).view(1, -1)
    return _product(grad8_NO, turned8, scale_N1, ones_1I, grad_NO.dtype)


class _LinearFp8(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        register: Tensor,
        exponent: Tensor,
        scale_O: Tensor,
        group: int,
        port: Tensor | None,
        least: int,
        unit: bool,
        x8: Tensor | None,
    ) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        rounds_x, ctx.rounds_grad = rounds_fp8(register, least, unit)
        if rounds_x:
            y_NO = forward_fp8(x_NI, _trits_op(register, False), scale_O, unit, x8)
        else:
            y_NO = linear(x_NI, register, exponent, group)
        ctx.group = group
        ctx.save_for_backward(x_NI if port is not None else None, register, exponent)
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, register, exponent = ctx.saved_tensors
        grad_NO = grad.reshape(-1, grad.shape[-1])
        x_grad = port_grad = None
        if ctx.needs_input_grad[0] and ctx.rounds_grad:
            x_grad = input_grad_fp8(grad_NO, _trits_op(register, True), scale_values(exponent))
        elif ctx.needs_input_grad[0]:
            x_grad = torch.ops.tritwise.linear_input_grad(grad_NO, register, exponent, ctx.group, LEAD)
        if x_grad is not None:
            x_grad = x_grad.view(*grad.shape[:-1], -1)
        if x_NI is not None:
            port_grad = torch.ops.tritwise.linear_weight_grad(grad_NO, x_NI)
        return x_grad, None, None, None, None, port_grad, None, None, None


def linear_fp8(
    x: Tensor,
    register: Tensor,
    exponent: Tensor,
    group: int = 256,
    port: Tensor | None = None,
    least: int = LEAST,
    unit: bool = False,
    x8: Tensor | None = None,
) -> Tensor:
    """`linear`, with x and dL/dy rounded to float8 for the products where `rounds_fp8` says that this pays.

    x: float [..., I]; register: int8 [O, I]; exponent: int8 [O, 1] -> x's dtype [..., O]. group, port: as in `linear`.
    least: as in `rounds_fp8`. unit: x has rows of about unit RMS. x8: such an x as float8 [..., I], times what makes
    the most of its range, where whoever made x has made that too. Only where `refuses_fp8` says None.
    """
    if not any(rounds_fp8(register, least, unit)):
        return linear(x, register, exponent, group, port)
    # Of scales here, as torch 2.11 cannot trace the table of all scales within a function within a checkpoint.
    how = group, port, least, unit, x8
    return _LinearFp8.apply(x, register, exponent, scale_values(exponent), *how)  # type: ignore[no-any-return]
