"""The byte language model: a pre-norm transformer whose weights are ternary, or float for a baseline.

Shape suffixes: B batch, T time, C width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from tritwise.models.config import ModelConfig
from tritwise.models.parts import Memory, feedforward_of, graph_of, memory_of, mixer_of
from tritwise.nn import (
    FloatEmbedding,
    FloatLinear,
    KVCache,
    NGramEmbedding,
    Rotary,
    TritEmbedding,
    TritLinear,
    rms_norm,
    trit_modules,
)

# Nothing here draws random numbers, and their generators cannot be read while a CUDA graph is recorded.
_AGAIN: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). [B, T, C] in and out."""

    def __init__(self, config: ModelConfig, linear: type[nn.Module]) -> None:
        super().__init__()
        self.attention = mixer_of(config, linear)
        self.mlp = feedforward_of(config, linear)

    def forward(self, x_BTC: Tensor, rotary: Rotary, cache: Memory | None = None) -> Tensor:
        x_BTC = x_BTC + self.attention(rms_norm(x_BTC), rotary, cache)
        return x_BTC + self.mlp(rms_norm(x_BTC))


class DecodeState:
    """What a model remembers between calls while it reads one sequence: KV caches, and the last few ids."""

    def __init__(self, caches: list[Memory], history_BP: Tensor) -> None:
        self.caches, self.history_BP = caches, history_BP

    @property
    def used(self) -> int:
        """Positions read so far."""
        return self.caches[0].used

    def tensors(self) -> dict[str, Tensor]:
        """All of an endless state by name, for a checkpoint."""
        found = {"history": self.history_BP, "used": torch.tensor(self.used)}
        for number, memory in enumerate(self.caches):
            assert not isinstance(memory, KVCache), "this state is not endless"
            found |= {f"{number}.{name}": tensor for name, tensor in memory.tensors().items()}
        return found

    def restore(self, tensors: dict[str, Tensor]) -> "DecodeState":
        """Become what `tensors` says, which is an earlier answer of `tensors()`; returns self."""
        self.history_BP = tensors["history"].clone().to(self.history_BP.device)
        for number, memory in enumerate(self.caches):
            assert not isinstance(memory, KVCache), "this state is not endless"
            memory.restore(*(tensors[f"{number}.{name}"] for name in memory.NAMES), used=int(tensors["used"]))
        return self


class ByteLM(nn.Module):
    """A causal language model over bytes.

    ids: int64 [B, T], T <= config.ctx -> logits float32 [B, T, V]; logits at t depend on ids up to t.
    With a `state` from `new_state`, ids continue what the state has read.
    `dtype` is the type of the activations (float32 or bfloat16); weights have none, so it may be changed at any time.
    `linear` and `embedding` replace the layers that config.weights stands for; their constructors take the same
    arguments (baselines of the benchmarks).

    Two ways to train in less memory, which change no result but for rounding:
    checkpoint: of every block only the input is kept for backward, and the block is computed again there, bit for bit
        (Chen et al. 2016), for a third more time. Layers must compute the same at both times: no dropout.
    loss_chunk: the loss takes logits of so many positions at a time, and again in backward, so that no float32 logits
        [B, T, V] ever exist; 0: all at once.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        *,
        linear: type[nn.Module] | None = None,
        embedding: type[nn.Module] | None = None,
        checkpoint: bool = False,
        loss_chunk: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.dtype, self.checkpoint, self.loss_chunk = config, dtype, checkpoint, loss_chunk
        ternary = config.weights == "trit"
        linear = linear or (TritLinear if ternary else FloatLinear)
        embedding = embedding or (TritEmbedding if ternary else FloatEmbedding)
        self.embed = embedding(config.vocab, config.width, group=config.group)
        self.ngrams = (
            NGramEmbedding(config.ngram_rows, config.width, config.ngrams, embedding=embedding, group=config.group)
            if config.ngrams > 1
            else None
        )
        self.graph = graph_of(config, linear)
        self.history = config.ctx if config.graph else config.ngrams - 1  # ids that a state keeps
        self.blocks = nn.ModuleList(Block(config, linear) for _ in range(config.depth))
        self.head = linear(config.width, config.vocab, role="head", group=config.group)
        self.rotary = Rotary(config.head_size, config.ctx)
        if config.column_scales:
            for _, layer in trit_modules(self):
                layer.add_column_scales()

    def forward(self, ids: Tensor, state: DecodeState | None = None) -> Tensor:
        return self._logits(self._features(ids, state))

    def _features(self, ids: Tensor, state: DecodeState | None = None) -> Tensor:
        """What the head reads, of the activations' dtype [B, T, C]."""
        x_BTC = rms_norm(self._embedded(ids, state))
        for index, block in enumerate(self.blocks):
            if self.checkpoint and state is None and torch.is_grad_enabled():
                x_BTC = recomputed(block, x_BTC, self.rotary, **_AGAIN)  # type: ignore[assignment]
            else:
                x_BTC = block(x_BTC, self.rotary, state.caches[index] if state is not None else None)
        return rms_norm(x_BTC)

    def _embedded(self, ids: Tensor, state: DecodeState | None) -> Tensor:
        """What stands for each byte before the first block, of the activations' dtype [B, T, C]."""
        time, read = ids.shape[1], ids
        if state is not None and self.history:
            read = torch.cat((state.history_BP, ids), dim=1)
            state.history_BP = read[:, -self.history :]
        shown = ids if self.graph is None else read  # a graph reaches back to bytes of earlier calls
        x_BSC = self.embed(shown)
        if self.ngrams is not None:
            x_BSC = x_BSC + self.ngrams(read, shown.shape[1])
        x_BSC = x_BSC.to(self.dtype)
        return x_BSC if self.graph is None else self.graph(x_BSC, read)[:, -time:]

    def _logits(self, x: Tensor) -> Tensor:
        """Capped logits float32 [..., V] of features [..., C]."""
        z = self.head(x).float()
        return self.config.softcap * torch.tanh(z / self.config.softcap)

    def loss(self, ids: Tensor, targets: Tensor, state: DecodeState | None = None) -> Tensor:
        """Mean cross-entropy in nats per byte. ids, targets: int64 [B, T]; a 0-d float32 tensor. With a state, ids
        continue what it has read."""
        x_NC, targets_N = self._features(ids, state).flatten(0, 1), targets.reshape(-1)
        count = len(x_NC)
        if not 0 < self.loss_chunk < count:
            return nn.functional.cross_entropy(self._logits(x_NC), targets_N)
        total = x_NC.new_zeros((), dtype=torch.float32)
        # The head's weight gradients of all chunks are added up before they reach its port, which fires once.
        for chunk in zip(x_NC.split(self.loss_chunk), targets_N.split(self.loss_chunk), strict=True):
            total = total + recomputed(self.loss_of_features, *chunk, **_AGAIN)  # type: ignore[operator]
        return total / count

    def loss_of_features(self, x_NC: Tensor, targets_N: Tensor) -> Tensor:
        """Sum of the cross-entropies, in nats, of positions whose features are [N, C] and targets int64 [N]."""
        return nn.functional.cross_entropy(self._logits(x_NC), targets_N, reduction="sum")

    @property
    def context(self) -> int:
        """Bytes that one call can read: the scorer's window."""
        return self.config.ctx

    def log_probs(self, ids: Tensor) -> Tensor:
        """Natural logs of the probabilities of the next byte, float32 [B, T, V]."""
        return torch.log_softmax(self(ids), dim=-1)

    def new_state(self, batch: int = 1, *, endless: bool = False) -> DecodeState:
        """An empty state for up to config.ctx positions; endless: for any number, read at most config.ctx at a time.

        An endless state holds what sliding windows can still see, and an LSTM's; no gradient goes back into it. Raises
        UserError for attention without a window.
        """
        c, device = self.config, next(self.parameters()).device
        caches = [memory_of(c, batch, device, self.dtype, endless=endless) for _ in self.blocks]
        return DecodeState(caches, torch.empty(batch, 0, dtype=torch.int64, device=device))
