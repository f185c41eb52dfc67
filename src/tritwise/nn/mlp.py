"""The feed-forward half of a block: up, relu squared, norm, down."""

from torch import Tensor, nn

from tritwise.nn.linear import TritLinear, give_unit_inputs
from tritwise.nn.norm import relu_squared_norm, relu_squared_norm_low


class MLP(nn.Module):
    """down(norm(relu(up(x))^2)), the activation of So et al. 2021 ("Primer"). x: [..., width], of unit RMS; same shape
    out.

    `linear` makes the layers: TritLinear or FloatLinear. leak: slope of the relu below zero.
    """

    def __init__(
        self, width: int, hidden: int, *, linear: type[nn.Module], group: int = 256, leak: float = 0.0
    ) -> None:
        super().__init__()
        self.leak = leak
        self.up = linear(width, hidden, group=group)
        self.down = linear(hidden, width, group=group)
        give_unit_inputs(self.up, self.down)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if not isinstance(self.down, TritLinear):
            return self.down(relu_squared_norm(h, self.leak))
        # The scales of its inputs cost nothing where these are made, and to round them little.
        x, x8 = relu_squared_norm_low(h, self.leak, self.down.column_scales(h.dtype), self.down.unit_factor)
        return self.down(x, scaled=True, x8=x8)
