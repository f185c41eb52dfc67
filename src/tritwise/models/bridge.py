"""The bridge: from the features of a frozen encoder to tokens of the byte stream, through ternary layers.

Encoders give channels of very different size, and what they have in common for all inputs can be most of them. So a
bridge first takes away every channel's mean and divides by its deviation, as measured once on the training data: these
are constants, not trained.

Shape suffixes: B batch, F frames or tokens of features, P tokens of the stream, D size of a feature, C width.
"""

import torch
from torch import Tensor, nn

from tritwise.nn import relu_squared_norm, rms_norm


class BridgeBlock(nn.Module):
    """x + down(relu²(up(x and its `reach` neighbours to either side))). [B, F, C] in and out."""

    def __init__(self, width: int, reach: int, linear: type[nn.Module], group: int) -> None:
        super().__init__()
        self.reach = reach
        self.up = linear((2 * reach + 1) * width, 2 * width, group=group)
        self.down = linear(2 * width, width, group=group)

    def forward(self, x_BFC: Tensor) -> Tensor:
        h_BFC = rms_norm(x_BFC)
        if self.reach:
            frames = h_BFC.shape[1]
            padded = nn.functional.pad(h_BFC, (0, 0, self.reach, self.reach))
            h_BFC = torch.cat([padded[:, at : at + frames] for at in range(2 * self.reach + 1)], dim=-1)
        return x_BFC + self.down(relu_squared_norm(self.up(h_BFC)))


class Bridge(nn.Module):
    """Features [B, F, D] -> hidden states [B, F, C] (`hidden`), and of these tokens [B, F / stride, C] (`tokens`).

    mean, spread: constants float32 [D], set by `measure`. size: D. width: C. stride: features that one token is made
    of; it divides F. depth: blocks. reach: of a block.
    """

    mean: Tensor
    spread: Tensor

    def __init__(
        self, size: int, width: int, *, stride: int, depth: int, reach: int, linear: type[nn.Module], group: int = 256
    ) -> None:
        super().__init__()
        self.stride = stride
        self.roles = {"mean": "table", "spread": "table"}
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("spread", torch.ones(size))
        self.into = linear(size, width, group=group)
        self.blocks = nn.ModuleList(BridgeBlock(width, reach, linear, group) for _ in range(depth))
        self.out = linear(stride * width, width, group=group)

    @torch.no_grad()
    def measure(self, mean_D: Tensor, spread_D: Tensor) -> None:
        """Set mean and deviation of the channels of features."""
        self.mean.copy_(mean_D)
        self.spread.copy_(spread_D)

    def hidden(self, features_BFD: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Hidden states of every feature, [B, F, C] of `dtype`, of unit RMS."""
        even_BFD = (features_BFD.float() - self.mean) / self.spread
        x_BFC = self.into(rms_norm(even_BFD).to(dtype))
        for block in self.blocks:
            x_BFC = block(x_BFC)
        return rms_norm(x_BFC)

    def tokens(self, hidden_BFC: Tensor) -> Tensor:
        """Tokens of the stream, [B, P, C]. The stream's own norm gives them their size."""
        batch, frames, width = hidden_BFC.shape
        return self.out(hidden_BFC.reshape(batch, frames // self.stride, self.stride * width))
