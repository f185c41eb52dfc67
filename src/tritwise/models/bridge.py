"""The bridge: from the features of a frozen encoder to tokens of the byte stream, through ternary layers.

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

    size: D. width: C. stride: features that one token is made of; it divides F. depth: blocks. reach: of a block.
    """

    def __init__(
        self, size: int, width: int, *, stride: int, depth: int, reach: int, linear: type[nn.Module], group: int = 256
    ) -> None:
        super().__init__()
        self.stride = stride
        self.into = linear(size, width, group=group)
        self.blocks = nn.ModuleList(BridgeBlock(width, reach, linear, group) for _ in range(depth))
        self.out = linear(stride * width, width, group=group)

    def hidden(self, features_BFD: Tensor) -> Tensor:
        """Hidden states of every feature, [B, F, C], of unit RMS."""
        x_BFC = self.into(rms_norm(features_BFD))
        for block in self.blocks:
            x_BFC = block(x_BFC)
        return rms_norm(x_BFC)

    def tokens(self, hidden_BFC: Tensor) -> Tensor:
        """Tokens of the stream, [B, P, C]. The stream's own norm gives them their size."""
        batch, frames, width = hidden_BFC.shape
        return self.out(hidden_BFC.reshape(batch, frames // self.stride, self.stride * width))
