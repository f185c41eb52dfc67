"""The byte language model: a pre-norm transformer whose weights are ternary, or float for a baseline.

Shape suffixes: B batch, T time, C width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from tritwise.models.block import Block
from tritwise.models.config import ModelConfig
from tritwise.models.parts import Memory, graph_of, memory_of
from tritwise.nn import (
    FloatEmbedding,
    FloatLinear,
    FloatVector,
    KVCache,
    NGramEmbedding,
    Rotary,
    TritEmbedding,
    TritLinear,
    TritVector,
    dropout,
    of_trits,
    rms_norm,
    trit_modules,
)

# Dropout needs no generator, and torch's cannot be read while a CUDA graph is recorded.
_AGAIN: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}


class Compiled(NamedTuple):
    """What runs in the place of a model's parts: each of its blocks, `embedded`, `values_of`, and the norm at last."""

    blocks: nn.ModuleList | Sequence[Callable[..., Tensor]]
    embedded: Callable[..., Tensor]
    values_of: Callable[..., list[Tensor]]
    last_norm: Callable[..., Tensor]


class DecodeState:
    """What a model remembers between calls while it reads one sequence: KV caches, one a layer, and the last few ids.
    It is for the number of repeats that it was made for."""

    def __init__(self, caches: list[Memory], history_BP: Tensor, loops: int = 0) -> None:
        self.caches, self.history_BP, self.loops = caches, history_BP, loops

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


def add_column_scales(model: nn.Module) -> None:
    """Every ternary matrix and table in `model` gets scales of its columns."""
    for _, layer in trit_modules(model):
        if layer.learns_scale:
            layer.add_column_scales()


class ByteLM(nn.Module):
    """A causal language model over bytes.

    ids: int64 [B, T], T <= config.ctx -> logits float32 [B, T, V]; logits at t depend on ids up to t.
    With a `state` from `new_state`, ids continue what the state has read.
    loops: how often the core runs, 1 … config.loops; 0 stands for config.loops, or what the state was made for. It is
    an argument of every call and never kept: one model runs at any depth (`at` is a view of it at one of them).
    `dtype` is the type of the activations (float32 or bfloat16); weights have none, so it may be changed at any time.
    `linear` and `embedding` replace the layers that config.weights stands for; their constructors take the same
    arguments (baselines of the benchmarks).

    config.dropout and ngram_dropout act in `loss` alone, while gradients are recorded. `noise`, int64 0-d, says which
    elements and lookups: whoever trains writes `nn.noise_of` there before each pass, as `train.stepper` does.

    Two ways to train in less memory, which change no result but for rounding:
    checkpoint: of every block only the input is kept for backward, and the block is computed again there, bit for bit
        (Chen et al. 2016), for a third more time.
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
        hashed = embedding or (TritEmbedding if ternary else FloatEmbedding)  # large tables: one trit
        linear = linear or (of_trits(TritLinear, config.weight_trits) if ternary else FloatLinear)
        embedding = embedding or (of_trits(TritEmbedding, config.weight_trits) if ternary else FloatEmbedding)
        vector = TritVector if ternary else FloatVector
        full = config.layers()
        self.embed = embedding(config.vocab, config.width, group=config.group)
        self.ngrams = (
            NGramEmbedding(
                *(config.ngram_rows, config.width, config.ngrams),
                embedding=hashed,
                linear=linear,
                words=config.word_tables,
                inner=config.ngram_width,
                group=config.group,
                share=config.ngram_dropout,
            )
            if config.hashed_tables
            else None
        )
        self.graph = graph_of(config, linear)
        self.history = config.ctx if config.graph else config.reach  # ids that a state keeps
        self.value_tables = nn.ModuleList(
            embedding(config.vocab, config.width, group=config.group) for _ in range(config.value_tables)
        )
        self.blocks = nn.ModuleList(Block(config, linear, vector) for _ in range(config.depth))
        repeated = config.core * (config.loops - 1)
        self.loop_embedding = vector(len(full), config.width) if config.loop_embedding else None
        # Rows: one a layer and table, the tables of a layer together.
        self.value_scale = vector(len(full) * config.value_tables, config.width) if config.value_tables else None
        # Rows: one a layer of the repeats after the first.
        self.repeat_skip = vector(repeated, config.width) if config.repeat_skip and repeated else None
        self.head = linear(config.width, config.vocab, role="head", group=config.group)
        self.rotary = Rotary(config.head_size, config.ctx)
        if config.column_scales:
            add_column_scales(self)
        self.compiled: Compiled | None = None
        """The parts as they were compiled one by one. None but within a step of training."""
        self.noise: Tensor | None
        self.roles = {"noise": "table"}
        drops = config.dropout > 0 or config.ngram_dropout > 0
        self.register_buffer("noise", torch.zeros((), dtype=torch.int64) if drops else None, persistent=False)

    def forward(self, ids: Tensor, state: DecodeState | None = None, loops: int = 0) -> Tensor:
        return self.logits(self._features(ids, state, loops))

    def _features(
        self, ids: Tensor, state: DecodeState | None = None, loops: int = 0, noise: Tensor | None = None
    ) -> Tensor:
        """What the head reads, of the activations' dtype [B, T, C]."""
        return self.read(self._parts.embedded(ids, state, noise), ids, state, loops, noise)

    @property
    def _parts(self) -> Compiled:
        """What runs now."""
        return self.compiled or Compiled(self.blocks, self.embedded, self.values_of, rms_norm)

    def read(
        self,
        x_BTC: Tensor,
        ids: Tensor,
        state: DecodeState | None = None,
        loops: int = 0,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Features that the head reads, [B, T, C], of normalised inputs such as `embedded` makes of ids [B, T]. noise:
        what dropout is drawn from; None: nothing is dropped."""
        if not self.config.dropout:
            noise = None
        if noise is not None:
            x_BTC = dropout(x_BTC, self.config.dropout, noise, 0)
        layers = self.config.layers(loops or (state.loops if state is not None else 0))
        parts = self._parts
        x0_BTC, values = x_BTC, parts.values_of(ids) if self.value_tables else []
        embeddings, scales, skips = (
            () if table is None else table().to(self.dtype).unbind()
            for table in (self.loop_embedding, self.value_scale, self.repeat_skip)
        )
        first = self.config.prelude + self.config.core  # the number of the first layer that repeats another
        before: dict[int, Tensor] = {}  # block -> what it gave last
        for index, layer in enumerate(layers):
            added: list[tuple[Tensor | None, Tensor]] = [(None, embeddings[layer.number])] if embeddings else []
            added += zip(scales[layer.number * len(values) :], values, strict=False)
            if skips and layer.repeat:
                added.append((skips[layer.number - first], before[layer.block]))
            exclusive = index >= len(layers) - self.config.exclusive
            block, given = parts.blocks[layer.block], (x0_BTC, exclusive, noise, 2 * index + 1, added)
            if self.checkpoint and state is None and torch.is_grad_enabled():
                x_BTC = recomputed(block, x_BTC, self.rotary, None, *given, **_AGAIN)  # type: ignore[assignment]
            else:
                x_BTC = block(x_BTC, self.rotary, state.caches[index] if state is not None else None, *given)
            if skips:
                before[layer.block] = x_BTC
        return parts.last_norm(x_BTC)

    def values_of(self, ids: Tensor) -> list[Tensor]:
        """What each table of values has for ids [B, T], of the activations' dtype [B, T, C]."""
        return [table(ids, self.dtype) for table in self.value_tables]

    def embedded(self, ids: Tensor, state: DecodeState | None = None, noise: Tensor | None = None) -> Tensor:
        """Normalised embeddings [B, T, C]; a state takes note of the last ids. noise: as of `read`."""
        time, read = ids.shape[1], ids
        if state is not None and self.history:
            read = torch.cat((state.history_BP, ids), dim=1)
            state.history_BP = read[:, -self.history :]
        shown = ids if self.graph is None else read  # a graph reaches back to bytes of earlier calls
        x_BSC = self.embed(shown, self.dtype)
        if self.ngrams is not None:
            x_BSC = x_BSC + self.ngrams(read, shown.shape[1], self.dtype, noise)
        return rms_norm(x_BSC if self.graph is None else self.graph(x_BSC, read)[:, -time:])

    def logits(self, x: Tensor) -> Tensor:
        """Capped logits float32 [..., V] of features [..., C]."""
        return self.capped(self.head(x))

    def capped(self, z: Tensor) -> Tensor:
        """softcap * tanh(z / softcap), float32."""
        return self.config.softcap * torch.tanh(z.float() / self.config.softcap)

    def loss(self, ids: Tensor, targets: Tensor, loops: int = 0, state: DecodeState | None = None) -> Tensor:
        """Mean cross-entropy in nats per byte. ids, targets: int64 [B, T]; a 0-d float32 tensor. With a state, ids
        continue what it has read."""
        x_NC = self._features(ids, state, loops, self.noise_now()).flatten(0, 1)
        targets_N = targets.reshape(-1)
        count = len(x_NC)
        if not 0 < self.loss_chunk < count:
            return nn.functional.cross_entropy(self.logits(x_NC), targets_N)
        total = x_NC.new_zeros((), dtype=torch.float32)
        # The head's weight gradients of all chunks are added up before they reach its port, which fires once.
        for chunk in zip(x_NC.split(self.loss_chunk), targets_N.split(self.loss_chunk), strict=True):
            total = total + recomputed(self.loss_of_features, *chunk, **_AGAIN)  # type: ignore[operator]
        return total / count

    def noise_now(self) -> Tensor | None:
        """What dropout is drawn from, if this pass is one of training."""
        return self.noise if torch.is_grad_enabled() else None

    def loss_of_features(self, x_NC: Tensor, targets_N: Tensor) -> Tensor:
        """Sum of the cross-entropies, in nats, of positions whose features are [N, C] and targets int64 [N]."""
        return nn.functional.cross_entropy(self.logits(x_NC), targets_N, reduction="sum")

    @property
    def context(self) -> int:
        """Bytes that one call can read: the scorer's window."""
        return self.config.ctx

    def log_probs(self, ids: Tensor, loops: int = 0) -> Tensor:
        """Natural logs of the probabilities of the next byte, float32 [B, T, V]."""
        return torch.log_softmax(self(ids, loops=loops), dim=-1)

    def new_state(self, batch: int = 1, loops: int = 0, *, endless: bool = False) -> DecodeState:
        """An empty state for up to config.ctx positions, with a cache for every layer of `loops` repeats.

        endless: for any number of positions, read at most config.ctx at a time. Such a state holds what sliding windows
        can still see, and an LSTM's; no gradient goes back into it. Raises UserError for attention without a window.
        """
        c, device = self.config, next(self.parameters()).device
        caches = [memory_of(c, batch, device, self.dtype, endless=endless) for _ in c.layers(loops)]
        return DecodeState(caches, torch.empty(batch, 0, dtype=torch.int64, device=device), loops)

    def at(self, loops: int) -> "AtDepth":
        """This model with `loops` repeats, for whoever scores it or samples from it."""
        return AtDepth(self, loops)


class AtDepth:
    """A view of a model at one depth. It is a `Predictor`, and `Cached`, in the scorer's words.

    Raises UserError for a depth that the model does not have.
    """

    def __init__(self, model: ByteLM, loops: int) -> None:
        model.config.layers(loops)
        self.model, self.loops = model, loops

    def __call__(self, ids: Tensor, state: DecodeState | None = None) -> Tensor:
        return self.model(ids, state, self.loops)

    def log_probs(self, ids: Tensor) -> Tensor:
        """Natural logs of the probabilities of the next byte, float32 [B, T, V]."""
        return self.model.log_probs(ids, self.loops)

    def new_state(self, batch: int = 1, *, endless: bool = False) -> DecodeState:
        """An empty state with a cache for every layer of this depth."""
        return self.model.new_state(batch, self.loops, endless=endless)

    @property
    def config(self) -> ModelConfig:
        """The model's."""
        return self.model.config

    @property
    def context(self) -> int:
        """Bytes that one call can read: the scorer's window."""
        return self.model.context

    def parameters(self) -> Iterator[nn.Parameter]:
        """The model's."""
        return self.model.parameters()
