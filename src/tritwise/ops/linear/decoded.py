"""The ternary linear with matrices that were decoded before it: many in one launch, for forward and backward alike.

Of all other operations each product decodes its matrix for itself and lets go of it. Where launches cost more than
memory, a step decodes all of its matrices ahead instead; they last until whoever asked for them lets go of them: two
bytes a weight in bfloat16, one for each direction in float8.

Shape suffixes: N rows of x, I inputs, O outputs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tritwise.ops.backends import choose
from tritwise.ops.float8 import filled, unit_factor
from tritwise.ops.linear.fp8 import forward_fp8, input_grad_fp8
from tritwise.ops.linear.operands import Operand, operand
from tritwise.registers import LEAD


@torch.no_grad()
def decode_many(
    registers: Sequence[Tensor],
    exponents: Sequence[Tensor],
    groups: Sequence[int],
    dtype: torch.dtype,
    rounds: Sequence[tuple[bool, bool]],
    units: Sequence[bool] = (),
    leads: Sequence[int] = (),
) -> list[Operand]:
    """What `linear_decoded` reads of each of several matrices on one device; all empty where the backend decodes within
    its products.

    registers: int8 [O, I]; exponents: int8 [O, ceil(I/group)]; dtype: of the activations. rounds: whether x, and
    whether dL/dy, is rounded to float8, as `rounds_fp8` says; only where `refuses_fp8` says None. units: whether each x
    is of unit RMS; none is, if nothing is said. leads: as of `linear`, of each; 81, if nothing is said. The bits are
    those that `linear` and `linear_fp8` decode.
    """
    if not registers:
        return []
    module, leads = choose("linear", registers[0].device), leads or [LEAD] * len(registers)
    if hasattr(module, "decode_many"):
        made = module.decode_many(registers, exponents, groups, dtype, rounds, leads)
    else:
        given = zip(registers, exponents, groups, rounds, leads, strict=True)
        ways = module.decode, module.trits_float8
        made = [operand(*ways, r, e, group, dtype, how, lead) for r, e, group, how, lead in given]
    parts = zip(made, registers, units or [False] * len(made), strict=True)
    return [_with_vectors(one, register, unit) for one, register, unit in parts]


def _with_vectors(made: Operand, register: Tensor, unit: bool) -> Operand:
    """With the scales of float8 products that all rows or columns have in common."""
    if made.turned8 is not None:
        made = made._replace(ones=filled(register.device, 1.0))
    if made.trits8 is not None and unit:
        made = made._replace(unit_x=filled(register.device, 1 / unit_factor(register.shape[1])))
    return made


class _LinearDecoded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        port: Tensor | None,
        unit: bool,
        weight: Tensor | None,
        trits8: Tensor | None,
        turned8: Tensor | None,
        scale_O: Tensor | None,
        ones: Tensor | None,
        unit_x: Tensor | None,
        x8: Tensor | None,
    ) -> Tensor:
        kept = (weight, None, None, None) if turned8 is None else (None, turned8, scale_O, ones)
        ctx.save_for_backward(x if port is not None else None, *kept)
        if trits8 is None or scale_O is None:
            assert weight is not None
            return torch.nn.functional.linear(x, weight)
        y_NO = forward_fp8(x.reshape(-1, x.shape[-1]), trits8, scale_O, unit, x8, unit_x)
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, turned8, scale_O, ones = ctx.saved_tensors
        x_grad = port_grad = None
        if ctx.needs_input_grad[0] and weight is not None:
            x_grad = grad @ weight
        elif ctx.needs_input_grad[0]:
            x_grad_NI = input_grad_fp8(grad.reshape(-1, grad.shape[-1]), turned8, scale_O, ones)
            x_grad = x_grad_NI.view(*grad.shape[:-1], -1)
        if x is not None:
            port_grad = torch.ops.tritwise.linear_weight_grad(grad, x)
        return x_grad, port_grad, *(None,) * 8


def linear_decoded(
    x: Tensor, operand: Operand, port: Tensor | None = None, unit: bool = False, x8: Tensor | None = None
) -> Tensor:
    """`linear` or `linear_fp8`, whichever `operand` was decoded for, with the same numbers.

    x: float [..., I] of a type that the operand `serves`, such as the one that it was decoded for -> the same type
    [..., O]. port: receives dL/dW as float32 [O, I] in backward, or None. unit, x8: as of `linear_fp8`.
    """
    return _LinearDecoded.apply(x, port, unit, *operand, x8)  # type: ignore[no-any-return]
