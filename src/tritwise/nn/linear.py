"""Linear layers without bias: `TritLinear`, and `FloatLinear`, its float twin for baselines."""

import math

import torch
from torch import Tensor, nn

from tritwise import ops
from tritwise.nn.trit import TritModule


class TritLinear(TritModule):
    """y = x W^T with a ternary W [out_features, in_features].

    x: float [..., in_features] (float32 or bfloat16) -> [..., out_features] of the same dtype.
    fp8: x and dL/dy are rounded to float8 for the products (`ops.linear_fp8`), which fast matrix units then take; see
    `use_fp8`. Arguments as `TritModule`. Training needs an optimizer that consumes the port: `tritwise.TritOptimizer`.
    """

    def __init__(
        self, in_features: int, out_features: int, *, role: str = "matrix", group: int = 256, blocks: int = 1
    ) -> None:
        super().__init__(out_features, in_features, role=role, fan_in=in_features, group=group, blocks=blocks)
        self.fp8 = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.scale_columns(x)
        if self.fp8:
            return ops.linear_fp8(x, self.register, self.row_scales(), self.port)
        return ops.linear(x, self.register, self.exponent, self.group, self.port)


def use_fp8(model: nn.Module) -> int:
    """Let every ternary matrix of `model` (embedding and head are none) round its inputs to float8; how many do.

    ValueError, with the reason, if one cannot.
    """
    layers = [m for m in model.modules() if isinstance(m, TritLinear) and m.role == "matrix"]
    for layer in layers:
        if reason := ops.refuses_fp8(layer.register, layer.exponent):
            raise ValueError(f"float8 is not for this model: {reason}")
    for layer in layers:
        layer.fp8 = True
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
