"""Linear layers without bias: `TritLinear`, and `FloatLinear`, its float twin for baselines."""

import math

import torch
from torch import Tensor, nn

from tritwise import ops
from tritwise.nn.trit import TritModule


class TritLinear(TritModule):
    """y = x W^T with a ternary W [out_features, in_features].

    x: float [..., in_features] (float32 or bfloat16) -> [..., out_features] of the same dtype.
    Arguments as `TritModule`. Training needs an optimizer that consumes the port: `tritwise.TritOptimizer`.
    """

    def __init__(
        self, in_features: int, out_features: int, *, role: str = "matrix", group: int = 256, blocks: int = 1
    ) -> None:
        super().__init__(out_features, in_features, role=role, fan_in=in_features, group=group, blocks=blocks)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(self.scale_columns(x), self.register, self.exponent, self.group, self.port)


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
