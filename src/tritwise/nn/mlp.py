"""The feed-forward half of a block: up, relu squared, down."""

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """down(norm(relu(up(x))^2)), the activation of So et al. 2021 ("Primer"). x: [..., width], same shape out.

    `linear` makes the layers: TritLinear or FloatLinear.
    """

    def __init__(self, width: int, hidden: int, *, linear: type[nn.Module], group: int = 256) -> None:
        super().__init__()
        self.up = linear(width, hidden, group=group)
        self.down = linear(hidden, width, group=group)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(_relu_squared_norm(self.up(x)))


def _relu_squared_norm(h: Tensor) -> Tensor:
    # The square of a ReLU has a heavy tail; normalised, `down` sees inputs of unit RMS like every other linear.
    h = torch.relu(h)
    return torch.nn.functional.rms_norm(h * h, (h.shape[-1],), eps=1e-6)
