"""The byte language model: a pre-norm transformer whose weights are ternary, or float for a baseline.

Shape suffixes: B batch, T time, C width, V vocabulary.
"""

import torch
from torch import Tensor, nn

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
)


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
    `dtype` is the type of the activations (float32 or bfloat16); weights have none.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        ternary = config.weights == "trit"
        linear: type[nn.Module] = TritLinear if ternary else FloatLinear
        embedding: type[nn.Module] = TritEmbedding if ternary else FloatEmbedding
        self.embed = embedding(config.vocab, config.width, group=config.group)
        self.ngrams = (
            NGramEmbedding(config.ngram_rows, config.width, config.ngrams, embedding=embedding, group=config.group)
            if config.ngrams > 1
            else None
        )
        self.blocks = nn.ModuleList(Block(config, linear) for _ in range(config.depth))
        self.head = linear(config.width, config.vocab, role="head", group=config.group)
        self.rotary = Rotary(config.head_size, config.ctx)

    def forward(self, ids: Tensor, state: DecodeState | None = None) -> Tensor:
        x_BTC = self.embed(ids)
        if self.ngrams is not None:
            time, read = ids.shape[1], ids
            if state is not None:
                read = torch.cat((state.history_BP, ids), dim=1)
                state.history_BP = read[:, -(self.config.ngrams - 1) :]
            x_BTC = x_BTC + self.ngrams(read, time)
        x_BTC = rms_norm(x_BTC.to(self.dtype))
        for index, block in enumerate(self.blocks):
            x_BTC = block(x_BTC, self.rotary, state.caches[index] if state is not None else None)
        z_BTV = self.head(rms_norm(x_BTC)).float()
        return self.config.softcap * torch.tanh(z_BTV / self.config.softcap)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per byte. ids, targets: int64 [B, T]; a 0-d float32 tensor."""
        logits = self(ids)
        return nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))

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
