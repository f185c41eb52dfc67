"""What a block of the byte model is made of, as its config says: the mixer, the layer after it, the graph before all.

A mixer is called with (x [B, T, C], rotary, memory): attention, or an LSTM, each with a memory of its own kind for
sequences that go on. Memories count the positions they have read in `used`.
"""

import torch
from torch import Tensor, nn

from tritwise.errors import UserError
from tritwise.models.config import ModelConfig
from tritwise.nn import MLP, Attention, KVCache, KVLedger, Rotary, TritGraph, TritLSTM, TritMoE
from tritwise.nn.lstm import LSTMState


class LSTMMemory:
    """What one recurrent mixer remembers between calls."""

    NAMES = ("h", "c")

    def __init__(self) -> None:
        self.state: LSTMState | None = None
        self.used = 0

    def tensors(self) -> dict[str, Tensor]:
        """The state by name; once something has been read."""
        assert self.state is not None
        return {"h": self.state.h_BH, "c": self.state.c_BH}

    def restore(self, h_BH: Tensor, c_BH: Tensor, *, used: int) -> None:
        """Become the memory of `used` positions that left this state."""
        self.state, self.used = LSTMState(h_BH.clone(), c_BH.clone()), used


class Recurrent(nn.Module):
    """An LSTM in the place of attention. Positions are told apart by their order alone: `rotary` is not read."""

    def __init__(self, width: int, *, linear: type[nn.Module], group: int) -> None:
        super().__init__()
        self.lstm = TritLSTM(width, width, linear=linear, group=group)

    def forward(
        self, x_BTC: Tensor, rotary: Rotary, memory: LSTMMemory | None = None, *, exclusive: bool = False
    ) -> Tensor:
        """exclusive means nothing here: an LSTM has no values that a position could meet again."""
        y_BTC, state = self.lstm(x_BTC, memory.state if memory is not None else None)
        if memory is not None:
            memory.state, memory.used = state, memory.used + x_BTC.shape[1]
        return y_BTC


Memory = KVCache | KVLedger | LSTMMemory


def mixer_of(config: ModelConfig, linear: type[nn.Module]) -> nn.Module:
    """The mixer of one block."""
    if config.mixer == "lstm":
        return Recurrent(config.width, linear=linear, group=config.group)
    return Attention(
        config.width, config.heads, config.kv_heads, linear=linear, window=config.window or None, group=config.group
    )


def feedforward_of(config: ModelConfig, linear: type[nn.Module]) -> nn.Module:
    """What follows the mixer in one block."""
    hidden = config.mlp_ratio * config.width
    if config.experts:
        own = config.hidden_of_expert
        return TritMoE(
            config.width,
            own,
            experts=config.experts,
            active=config.active_experts,
            max_iters=config.max_moe_iters,
            linear=linear,
            group=config.group,
            leak=config.leak,
        )
    return MLP(config.width, hidden, linear=linear, group=config.group, leak=config.leak)


def graph_of(config: ModelConfig, linear: type[nn.Module]) -> TritGraph | None:
    """What relates the bytes before the first block."""
    return TritGraph(config.width, linear=linear, group=config.group) if config.graph else None


def memory_of(
    config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype, *, endless: bool = False
) -> Memory:
    """An empty memory for one block's mixer. endless: one that a stream never fills up.

    Raises UserError for endless attention without a window: it would have to remember everything.
    """
    if config.mixer == "lstm":
        return LSTMMemory()
    if not endless:
        return KVCache(batch, config.kv_heads, config.ctx, config.head_size, device, dtype)
    if not config.window:
        raise UserError("attention without a window cannot read on without an end; train with --set window=64")
    return KVLedger(config.window)
