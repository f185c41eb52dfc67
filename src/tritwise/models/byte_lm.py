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


class ByteLM(nn.Module):
    """A causal language model over bytes.

    ids: int64 [B, T], T <= config.ctx -> logits float32 [B, T, V]; logits at t depend on ids up to t.
    `dtype` is the type of the activations (float32 or bfloat16); weights have none.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        ternary = config.weights == "trit"
        linear: type[nn.Module] = TritLinear if ternary else FloatLinear
        self.embed = (TritEmbedding if ternary else FloatEmbedding)(config.vocab, config.width, group=config.group)
        self.ngrams = nn.ModuleList(
            (TritEmbedding if ternary else FloatEmbedding)(config.ngram_rows, config.width, group=config.group)
            for _ in range(config.ngrams - 1)
        )
        self.blocks = nn.ModuleList(Block(config, linear) for _ in range(config.depth))
        self.head = linear(config.width, config.vocab, role="head", group=config.group)
        self.rotary = Rotary(config.head_size, config.ctx)

    def forward(self, ids: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        x_BTC = self.embed(ids)
        h = ids
        for n, table in enumerate(self.ngrams, 1):
            h = h * 1000003 + torch.nn.functional.pad(ids, (n, 0))[:, : ids.shape[1]] + 1
            x_BTC = x_BTC + table(((h * 2654435761) >> 12) % self.config.ngram_rows)
        x_BTC = rms_norm(x_BTC.to(self.dtype))
        for index, block in enumerate(self.blocks):
            x_BTC = block(x_BTC, self.rotary, caches[index] if caches else None)
        z_BTV = self.head(rms_norm(x_BTC)).float()
        return self.config.softcap * torch.tanh(z_BTV / self.config.softcap)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per byte. ids, targets: int64 [B, T]; a 0-d float32 tensor."""
        logits = self(ids)
        return nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))

    def new_caches(self, batch: int = 1) -> list[KVCache]:
        """Empty KV caches for config.ctx positions, one per block."""
        c, device = self.config, next(self.parameters()).device
        return [KVCache(batch, c.kv_heads, c.ctx, c.head_size, device, self.dtype) for _ in self.blocks]
