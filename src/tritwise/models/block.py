"""A block of a transformer: attention or an LSTM, then an MLP or experts, each on a normalised stream and added to it.

Shape suffixes: B batch, T time, C width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tritwise.models.config import ModelConfig
from tritwise.models.parts import Memory, feedforward_of, mixer_of
from tritwise.nn import Rotary, TritVector, dropout, rms_norm
from tritwise.nn.vector import FloatVector


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). [B, T, C] in and out.

    What is added before, such as embeddings of a repeat, belongs to the block so that it is compiled with it.
    With config.input_mix, x is then mixed with the model's input x0: a ⊙ x + b ⊙ x0, a = 1 and b = 0 at the start.
    With config.gains, what attention and MLP add is multiplied by a learned gain a channel, 1 at the start.
    config.dropout acts on what they add, where there is `noise`.
    """

    def __init__(
        self, config: ModelConfig, linear: type[nn.Module], vector: type[TritVector | FloatVector] = TritVector
    ) -> None:
        super().__init__()
        self.attention = mixer_of(config, linear)
        self.mlp = feedforward_of(config, linear)
        self.mix = vector(2, config.width, (1.0, 0.0)) if config.input_mix else None
        self.gain = vector(2, config.width, 1.0) if config.gains else None
        self.dropout = config.dropout

    def forward(
        self,
        x_BTC: Tensor,
        rotary: Rotary,
        cache: Memory | None = None,
        x0_BTC: Tensor | None = None,
        exclusive: bool = False,
        noise: Tensor | None = None,
        place: int = 0,
        added: Sequence[tuple[Tensor | None, Tensor]] = (),
    ) -> Tensor:
        """x0_BTC: the model's input, for the mix; None stands for x itself. exclusive: as in `Attention`. noise, place:
        as of `dropout`, which also takes the place after this one; None: nothing is dropped. added: what x gets first,
        [B, T, C] or [C] each, behind how strongly in each channel, [C]; None: as it is."""
        for scale_C, other in added:
            x_BTC = x_BTC + other if scale_C is None else torch.addcmul(x_BTC, scale_C, other)
        if self.mix is not None:
            keep_C, input_C = self.mix().to(x_BTC.dtype).unbind()
            x_BTC = keep_C * x_BTC + input_C * (x_BTC if x0_BTC is None else x0_BTC)
        gains = (None, None) if self.gain is None else self.gain().to(x_BTC.dtype).unbind()
        found_BTC = self.attention(rms_norm(x_BTC), rotary, cache, exclusive=exclusive)
        if noise is not None:
            found_BTC = dropout(found_BTC, self.dropout, noise, place)
        x_BTC = x_BTC + (found_BTC if gains[0] is None else gains[0] * found_BTC)
        found_BTC = self.mlp(rms_norm(x_BTC))
        if noise is not None:
            found_BTC = dropout(found_BTC, self.dropout, noise, place + 1)
        return x_BTC + (found_BTC if gains[1] is None else gains[1] * found_BTC)
