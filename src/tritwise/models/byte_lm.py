"""The byte language model: a pre-norm transformer whose weights are ternary, or float for a baseline.

Shape suffixes: B batch, T time, C width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from tritwise.models.config import ModelConfig
from tritwise.nn import (
    MLP,
    Attention,
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
        self.attention = Attention(
            config.width,
            config.heads,
            config.kv_heads,
            linear=linear,
            window=config.window or None,
            group=config.group,
        )
        self.mlp = MLP(config.width, config.mlp_ratio * config.width, linear=linear, group=config.group)

    def forward(self, x_BTC: Tensor, rotary: Rotary, cache: KVCache | None = None) -> Tensor:
        x_BTC = x_BTC + self.attention(rms_norm(x_BTC), rotary, cache)
        return x_BTC + self.mlp(rms_norm(x_BTC))


class DecodeState:
    """What a model remembers between calls while it reads one sequence: KV caches, and the last few ids."""

    def __init__(self, caches: list[KVCache], history_BP: Tensor) -> None:
        self.caches, self.history_BP = caches, history_BP

    @property
    def used(self) -> int:
        """Positions read so far."""
        return self.caches[0].used


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
        self.blocks = nn.ModuleList(Block(config, linear) for _ in range(config.depth))
        self.head = linear(config.width, config.vocab, role="head", group=config.group)
        self.rotary = Rotary(config.head_size, config.ctx)
        if config.column_scales:
            for _, layer in trit_modules(self):
                layer.add_column_scales()

    def forward(self, ids: Tensor, state: DecodeState | None = None) -> Tensor:
        return self.logits(self._features(ids, state))

    def _features(self, ids: Tensor, state: DecodeState | None = None) -> Tensor:
        """What the head reads, of the activations' dtype [B, T, C]."""
        return self.read(self.embedded(ids, state), state)

    def embedded(self, ids: Tensor, state: DecodeState | None = None) -> Tensor:
        """What stands for the symbols before the first block, float32 [B, T, C]; `read` goes on from there."""
        x_BTC = self.embed(ids)
        if self.ngrams is not None:
            time, read = ids.shape[1], ids
            if state is not None:
                read = torch.cat((state.history_BP, ids), dim=1)
                state.history_BP = read[:, -(self.config.ngrams - 1) :]
            x_BTC = x_BTC + self.ngrams(read, time)
        return x_BTC

    def read(self, x_BTC: Tensor, state: DecodeState | None = None) -> Tensor:
        """Features that the head reads, of the activations' dtype [B, T, C], from what `embedded` gives."""
        x_BTC = rms_norm(x_BTC.to(self.dtype))
        for index, block in enumerate(self.blocks):
            if self.checkpoint and state is None and torch.is_grad_enabled():
                x_BTC = recomputed(block, x_BTC, self.rotary, **_AGAIN)  # type: ignore[assignment]
            else:
                x_BTC = block(x_BTC, self.rotary, state.caches[index] if state is not None else None)
        return rms_norm(x_BTC)

    def logits(self, x: Tensor) -> Tensor:
        """Capped logits float32 [..., V] of features [..., C]."""
        return self.capped(self.head(x))

    def capped(self, z: Tensor) -> Tensor:
        """softcap * tanh(z / softcap), float32."""
        return self.config.softcap * torch.tanh(z.float() / self.config.softcap)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per byte. ids, targets: int64 [B, T]; a 0-d float32 tensor."""
        x_NC, targets_N = self._features(ids).flatten(0, 1), targets.reshape(-1)
        count = len(x_NC)
        if not 0 < self.loss_chunk < count:
            return nn.functional.cross_entropy(self.logits(x_NC), targets_N)
        total = x_NC.new_zeros((), dtype=torch.float32)
        # The head's weight gradients of all chunks are added up before they reach its port, which fires once.
        for chunk in zip(x_NC.split(self.loss_chunk), targets_N.split(self.loss_chunk), strict=True):
            total = total + recomputed(self.loss_of_features, *chunk, **_AGAIN)  # type: ignore[operator]
        return total / count

    def loss_of_features(self, x_NC: Tensor, targets_N: Tensor) -> Tensor:
        """Sum of the cross-entropies, in nats, of positions whose features are [N, C] and targets int64 [N]."""
        return nn.functional.cross_entropy(self.logits(x_NC), targets_N, reduction="sum")

    @property
    def context(self) -> int:
        """Bytes that one call can read: the scorer's window."""
        return self.config.ctx

    def log_probs(self, ids: Tensor) -> Tensor:
        """Natural logs of the probabilities of the next byte, float32 [B, T, V]."""
        return torch.log_softmax(self(ids), dim=-1)

    def new_state(self, batch: int = 1) -> DecodeState:
        """An empty state for up to config.ctx positions."""
        c, device = self.config, next(self.parameters()).device
        caches = [KVCache(batch, c.kv_heads, c.ctx, c.head_size, device, self.dtype) for _ in self.blocks]
        return DecodeState(caches, torch.empty(batch, 0, dtype=torch.int64, device=device))
