"""Ternary linear: y = x W^T with W[o, i] = leading_trit(register[o, i]) * scale(exponent[o, group of i]).

Where a weight is more than the first trit of its register, W = round(register / lead) * scale: `lead` is 81 for one,
27 for the two leading trits, nine values, and so on (`registers.lead_of`).

Shape suffixes: x_NI inputs, y_NO outputs, register_OI and exponent_OG int8, G = ceil(I / group).

Gradients leave through a *port*: a float tensor of shape [O, I] that takes no memory (stride 0, one element) and holds
no weight. Autograd delivers dL/dW to it and the optimizer consumes it there as soon as backward has made it. What a
matmul reads is decoded for that matmul and let go, or for a whole recorded step (decoded.py); from step to step no
float copy of a weight is kept. Without a port (inference, frozen layers) the weight gradient is not computed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritwise.ops import gpu, native
from tritwise.ops.backends import choose, implement
from tritwise.ops.library import LIBRARY, define
from tritwise.ops.linear import cpu, reference, tilelang, triton
from tritwise.registers import LEAD

implement("linear", "reference", reference)
implement("linear", "cpu", cpu, priority=10, devices=("cpu",), refuses=native.refuses)
implement("linear", "triton", triton, priority=20, devices=("cuda",), refuses=gpu.refuses)
implement(
    "linear", "tilelang", tilelang, priority=-10, devices=("cuda",), refuses=tilelang.refuses
)  # only if asked for


def _forward(x: Tensor, register: Tensor, exponent: Tensor, group: int, port: Tensor | None, lead: int) -> Tensor:
    return choose("linear", x.device).forward(x, register, exponent, group, lead)


def _input_grad(grad: Tensor, register: Tensor, exponent: Tensor, group: int, lead: int) -> Tensor:
    return choose("linear", grad.device).input_grad(grad, register, exponent, group, lead)


def _weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    return choose("linear", grad.device).weight_grad(grad, x)


def _scale_grad(weight_grad: Tensor, register: Tensor, exponent: Tensor, group: int, lead: int) -> Tensor:
    return choose("linear", weight_grad.device).scale_grad(weight_grad, register, exponent, group, lead)


def _column_grad(weight_grad: Tensor, register: Tensor, exponent: Tensor, group: int, lead: int) -> Tensor:
    return choose("linear", weight_grad.device).column_grad(weight_grad, register, exponent, group, lead)


def _scale_grads(
    grads: list[Tensor], registers: list[Tensor], exponents: list[Tensor], groups: list[int], leads: list[int]
) -> list[Tensor]:
    return _each("scale_grad", grads, registers, exponents, groups, leads)


def _column_grads(
    grads: list[Tensor], registers: list[Tensor], exponents: list[Tensor], groups: list[int], leads: list[int]
) -> list[Tensor]:
    return _each("column_grad", grads, registers, exponents, groups, leads)


def _each(name: str, grads: list[Tensor], *others: list[Any]) -> list[Tensor]:
    """By the backend's function for many, `name` in the plural, or its function for one."""
    module = choose("linear", grads[0].device)
    if hasattr(module, f"{name}s"):
        return getattr(module, f"{name}s")(grads, *others)
    return [getattr(module, name)(*one) for one in zip(grads, *others, strict=True)]


_linear = define(
    "linear(Tensor x, Tensor register, Tensor exponent, int group, Tensor? port, int lead) -> Tensor",
    _forward,
    lambda x, register, exponent, group, port, lead: x.new_empty(*x.shape[:-1], register.shape[0]),
)
_linear_input_grad = define(
    "linear_input_grad(Tensor grad, Tensor register, Tensor exponent, int group, int lead) -> Tensor",
    _input_grad,
    lambda grad, register, exponent, group, lead: grad.new_empty(*grad.shape[:-1], register.shape[1]),
)
_linear_weight_grad = define(
    "linear_weight_grad(Tensor grad, Tensor x) -> Tensor",
    _weight_grad,
    lambda grad, x: grad.new_empty(grad.shape[-1], x.shape[-1], dtype=torch.float32),
)
_linear_scale_grad = define(
    "linear_scale_grad(Tensor weight_grad, Tensor register, Tensor exponent, int group, int lead) -> Tensor",
    _scale_grad,
    lambda weight_grad, register, exponent, group, lead: weight_grad.new_empty(exponent.shape),
)
_linear_column_grad = define(
    "linear_column_grad(Tensor weight_grad, Tensor register, Tensor exponent, int group, int lead) -> Tensor",
    _column_grad,
    lambda weight_grad, register, exponent, group, lead: weight_grad.new_empty(register.shape[1]),
)

_linear_scale_grads = define(
    "linear_scale_grads(Tensor[] weight_grads, Tensor[] registers, Tensor[] exponents, int[] groups, int[] leads) "
    "-> Tensor[]",
    _scale_grads,
    lambda grads, registers, exponents, groups, leads: [
        g.new_empty(e.shape) for g, e in zip(grads, exponents, strict=True)
    ],
)
_linear_column_grads = define(
    "linear_column_grads(Tensor[] weight_grads, Tensor[] registers, Tensor[] exponents, int[] groups, int[] leads) "
    "-> Tensor[]",
    _column_grads,
    lambda grads, registers, exponents, groups, leads: [grad.new_empty(grad.shape[1]) for grad in grads],
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, register, exponent, ctx.group, port, ctx.lead = inputs
    keeps_x = port is not None and ctx.needs_input_grad[4]
    ctx.save_for_backward(x if keeps_x else None, register, exponent)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, register, exponent = ctx.saved_tensors
    x_grad = _linear_input_grad(grad, register, exponent, ctx.group, ctx.lead) if ctx.needs_input_grad[0] else None
    port_grad = _linear_weight_grad(grad, x) if x is not None else None
    return x_grad, None, None, None, port_grad, None


torch.library.register_autograd("tritwise::linear", _backward, setup_context=_setup, lib=LIBRARY)


def linear(
    x: Tensor,
    register: Tensor,
    exponent: Tensor,
    group: int = 256,
    port: Tensor | None = None,
    lead: int = LEAD,
) -> Tensor:
    """y = x W^T. x: float [..., I]; register: int8 [O, I]; exponent: int8 [O, ceil(I/group)] -> x's dtype [..., O].

    group: inputs that share one scale exponent. port: receives dL/dW as float32 [O, I] in backward, or None. lead: what
    1 of W is worth in a register.
    """
    return _linear(x, register, exponent, group, port, lead)


def linear_scale_grad(
    weight_grad: Tensor, register: Tensor, exponent: Tensor, group: int = 256, lead: int = LEAD
) -> Tensor:
    """dL/d(log2 scale) / ln 2 for each exponent: the sum of dL/dW * W over its group, float32 [O, G]."""
    return _linear_scale_grad(weight_grad, register, exponent, group, lead)


def linear_column_grad(
    weight_grad: Tensor, register: Tensor, exponent: Tensor, group: int = 256, lead: int = LEAD
) -> Tensor:
    """The same for a scale of each column, of which W's own are apart: the sum of dL/dW * W over it, float32 [I]."""
    return _linear_column_grad(weight_grad, register, exponent, group, lead)


def linear_scale_grads(
    weight_grads: Sequence[Tensor],
    registers: Sequence[Tensor],
    exponents: Sequence[Tensor],
    groups: Sequence[int],
    leads: Sequence[int] = (),
) -> list[Tensor]:
    """`linear_scale_grad` of each of several matrices on one device (at least one), with the same bits. leads: of each;
    81, if nothing is said."""
    leads = list(leads) or [LEAD] * len(weight_grads)
    return _linear_scale_grads(list(weight_grads), list(registers), list(exponents), list(groups), leads)


def linear_column_grads(
    weight_grads: Sequence[Tensor],
    registers: Sequence[Tensor],
    exponents: Sequence[Tensor],
    groups: Sequence[int],
    leads: Sequence[int] = (),
) -> list[Tensor]:
    """`linear_column_grad` of each of several matrices on one device (at least one), with the same bits. leads: of
    each; 81, if nothing is said."""
    leads = list(leads) or [LEAD] * len(weight_grads)
    return _linear_column_grads(list(weight_grads), list(registers), list(exponents), list(groups), leads)
