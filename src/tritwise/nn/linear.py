"""Linear layers without bias: `TritLinear`, and `FloatLinear`, its float twin for baselines."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tritwise import ops
from tritwise.nn.trit import TritModule


class TritLinear(TritModule):
    """y = x W^T with a ternary W [out_features, in_features].

    x: float [..., in_features] (float32 or bfloat16) -> [..., out_features] of the same dtype.
    fp8_least: None, or while gradients are recorded x and dL/dy are rounded to float8 for products that large
    (`ops.linear_fp8`), which fast matrix units then take; see `use_fp8`. unit_inputs: whether x has about unit RMS,
    which is easier to round (`give_unit_inputs`). operand: W as `decoded` has made it, which is then read in the
    place of the registers while gradients are recorded; else empty. decodes_ahead: whether `decoded` is for it.
    Arguments as `TritModule`. Training needs an optimizer that consumes the port: `tritwise.TritOptimizer`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        role: str = "matrix",
        group: int = 256,
        blocks: int = 1,
        weight_trits: int = 1,
    ) -> None:
        how: dict[str, Any] = {"group": group, "blocks": blocks, "weight_trits": weight_trits}
        super().__init__(out_features, in_features, role=role, fan_in=in_features, **how)
        self.fp8_least: int | None = None
        self.unit_inputs = False
        self.decodes_ahead = True
        # Not None: torch.compile, asked why it has to compile a block anew, looks into what it has seen decoded.
        self.operand = ops.Operand()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"operand": ops.Operand()}

    @property
    def rounds(self) -> tuple[bool, bool]:
        """Whether x is rounded to float8, and whether dL/dy is, while gradients are recorded."""
        if self.fp8_least is None:
            return False, False
        return ops.rounds_fp8(self.register, self.fp8_least, self.unit_inputs)

    @property
    def unit_factor(self) -> float:
        """What x is multiplied by before it is rounded, where one factor for all of its rows serves; else 0."""
        rounds = self.unit_inputs and torch.is_grad_enabled() and self.rounds[0]
        return ops.unit_factor(self.register.shape[1]) if rounds else 0.0

    def forward(self, x: Tensor, *, scaled: bool = False, x8: Tensor | None = None) -> Tensor:
        """scaled: x has been through `scale_columns` already. x8: x times `unit_factor` as float8, of x's shape, where
        it is there already."""
        x = x if scaled else self.scale_columns(x)
        if torch.is_grad_enabled() and self.operand.serves(x.dtype):
            return ops.linear_decoded(x, self.operand, self.port, self.unit_inputs, x8)
        if self.fp8_least is not None and torch.is_grad_enabled():
            how = self.group, self.port, self.fp8_least, self.unit_inputs, x8
            return ops.linear_fp8(x, self.register, self.exponent, *how)
        return ops.linear(x, self.register, self.exponent, self.group, self.port, self.lead)


def give_unit_inputs(*layers: nn.Module) -> None:
    """Tell ternary layers that their inputs have about unit RMS, as behind a norm; others need not know."""
    for layer in layers:
        if isinstance(layer, TritLinear):
            layer.unit_inputs = True


def stacked(layers: Sequence[nn.Module], dtype: torch.dtype) -> Tensor | None:
    """What inputs of several layers of one shape are multiplied by, scales of columns included, as `dtype` [layers,
    out_features, in_features], with the gradient of each; None for layers of which it is not known."""
    if all(type(layer) is FloatLinear for layer in layers):
        return torch.stack([layer.weight for layer in layers]).to(dtype)  # type: ignore[misc]
    ternary = [layer for layer in layers if isinstance(layer, TritLinear)]
    if len(ternary) < len(layers):
        return None
    columns = [layer.column_exponent for layer in ternary if layer.column_exponent is not None]
    if columns and len(columns) < len(ternary):
        return None
    tensors = [layer.register for layer in ternary], [layer.exponent for layer in ternary]
    groups, leads = [layer.group for layer in ternary], [layer.lead for layer in ternary]
    return ops.stacked_weights(*tensors, groups, dtype, [layer.port for layer in ternary], columns, leads)


@contextlib.contextmanager
def decoded(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within it, W of every ternary linear of `model` lies decoded for activations of `dtype`, and whatever records
    gradients reads it there: two bytes a weight in bfloat16, one for each product that is rounded to float8, and all at
    once. Nothing may move registers or scales meanwhile. Afterwards, and after an error, none is left.

    On a GPU it is one launch, where each product would take two. Activations of another type decode as ever.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, TritLinear) and layer.decodes_ahead]
    tensors = [layer.register for layer in layers], [layer.exponent for layer in layers]
    how = [layer.rounds for layer in layers], [layer.unit_inputs for layer in layers]
    groups, leads = [layer.group for layer in layers], [layer.lead for layer in layers]
    made = ops.decode_many(*tensors, groups, dtype, *how, leads)
    for layer, operand in zip(layers, made, strict=True):
        layer.operand = operand
    try:
        yield
    finally:
        for layer in layers:
            layer.operand = ops.Operand()


def use_fp8(model: nn.Module, least: int = ops.FP8_LEAST) -> int:
    """Let ternary matrices of `model` (embedding and head are none) round what large products multiply to float8, while
    gradients are recorded: what is scored and sampled stays exact. How many matrices round anything; see `rounds_fp8`
    for what `least` decides. Others are left alone.

    ValueError, with reason and remedy, if one that should cannot, or none should.
    """
    layers = [m for m in model.modules() if isinstance(m, TritLinear) and m.role == "matrix"]
    layers = [layer for layer in layers if any(ops.rounds_fp8(layer.register, least, layer.unit_inputs))]
    reasons = [reason for layer in layers if (reason := ops.refuses_fp8(layer.register, layer.exponent))]
    if any(layer.weight_trits > 1 for layer in layers):
        reasons = ["its products hold weights of one trit; set weight_trits=1"]
    if not layers:
        reasons = [f"no ternary matrix is wide enough for it to pay, from {least // 2} rows on; leave fp8 off"]
    if reasons:
        raise ValueError(f"float8 is not for this model: {reasons[0]}")
    for layer in layers:
        layer.fp8_least = least
    return len(layers)


class FloatLinear(nn.Module):
    """The same layer with a float weight [out_features, in_features], normal of standard deviation 1/sqrt(in)."""

    def __init__(
        self, in_features: int, out_features: int, *, role: str = "matrix", group: int = 256, blocks: int = 1
    ) -> None:
        super().__init__()
        self.roles, self.blocks = {"weight": role}, blocks
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.normal_(self.weight, std=1.0 / math.sqrt(in_features))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))
