"""Models of the engine's benchmarks: presets by size, shapes by weights, and large models built in little time."""

import copy
import difflib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tritwise.bench.rules import Optimizers, Rule
from tritwise.errors import UserError
from tritwise.models import ByteLM, ModelConfig

ASPECT = 64
"""Width over depth of the shapes that `shape_of` gives: near that of the presets."""

ROW = 1 << 16
"""As a group of inputs that share a scale: the whole row, which `ours-fp8` needs."""

MODES = ("eager", "blocks", "whole", "graph", "blocks-graph")
"""How steps run. blocks: every block compiled, one code for all. whole: the loss compiled as one. graph: that, and
forward and backward replayed as one CUDA graph; blocks-graph: the same of compiled blocks."""


@dataclass(frozen=True)
class Size:
    """A model and its step: `accum` micro-batches of `batch` sequences of config.ctx bytes, run in one of MODES.

    checkpoint: activations inside blocks are computed again in backward (`ByteLM`). UserError for what cannot be run.
    """

    name: str
    config: ModelConfig
    batch: int
    accum: int = 1
    mode: str = "blocks"
    checkpoint: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "accum"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.mode not in MODES:
            raise UserError(f"mode is {self.mode!r}; choose one of {', '.join(MODES)}")
        if self.mode.endswith("graph") and self.accum > 1:
            raise UserError(f"mode {self.mode} replays whole steps, not {self.accum} micro-batches; choose blocks")

    @property
    def bytes_a_step(self) -> int:
        """Bytes of text that one optimizer step reads."""
        return self.batch * self.accum * self.config.ctx


SIZES = {
    size.name: size
    for size in (
        Size("tiny", ModelConfig(width=64, depth=2, ctx=64, group=ROW), batch=8, mode="eager"),
        Size("19m", ModelConfig(width=512, depth=6, ctx=512, group=ROW), batch=64, mode="graph"),
        Size("124m", ModelConfig(width=768, depth=17, ctx=1024, group=ROW), batch=64),
        Size("1.3b", ModelConfig(width=2048, depth=26, ctx=1024, group=ROW), batch=16, accum=4),
        Size("3b", ModelConfig(width=2560, depth=38, ctx=1024, group=ROW), batch=8, accum=8),
    )
}
"""By their weights. 19m is the model and the batch of `bench rules --full`; larger ones read 65,536 bytes a step."""


def size_called(name: str) -> Size:
    """The preset of that name. Raises UserError, naming the nearest, if there is none."""
    if name not in SIZES:
        near = difflib.get_close_matches(name, SIZES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose of {', '.join(SIZES)}"
        raise UserError(f"there is no size {name!r}; {hint}")
    return SIZES[name]


def weights_of(shape: ModelConfig) -> int:
    """Weights of a ByteLM of `shape` with as many key-value heads as heads and no n-grams."""
    block = (4 + 2 * shape.mlp_ratio) * shape.width**2
    return shape.depth * block + 2 * shape.vocab * shape.width


def flops_of(shape: ModelConfig, bytes_read: int) -> float:
    """Floating-point operations of forward and backward over `bytes_read` bytes: what a model needs, not what a
    recomputing step spends. 6 for each weight of a product and byte, and 6 * depth * width * ctx a byte for causal
    attention, which is half of the square. The embedding multiplies nothing.
    """
    products = weights_of(shape) - shape.vocab * shape.width
    return bytes_read * (6.0 * products + 6.0 * shape.depth * shape.width * shape.ctx)


def shape_of(weights: float, ctx: int) -> ModelConfig:
    """The shape whose weights are nearest to `weights` with a width of about ASPECT times the depth.

    Widths are multiples of 256 (of 64 below 512), so depth is what settles the number.
    """
    width = (weights * ASPECT / 12) ** (1 / 3)
    step = 256 if width >= 512 else 64
    width = max(64, step * round(width / step))
    depth = max(1, round((weights - 512 * width) / (12 * width**2)))
    return ModelConfig(width=width, depth=depth, ctx=ctx, group=ROW)


def build_quickly(
    rule: Rule,
    shape: ModelConfig,
    settings: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    steps: int = 1000,
) -> tuple[ByteLM, Optimizers]:
    """As `rule.build`, with one block drawn and the others derived from it on the device (`deepen`).

    settings: "rate", and any of the rule's settings.
    """
    rule.check({name: value for name, value in settings.items() if name != "rate"})
    # Made without settings: some change registers when an optimizer takes the layers, which must happen once.
    model, _ = rule.build(replace(shape, depth=1), {"rate": settings["rate"]}, seed, dtype, steps, device)
    deepen(model, shape.depth)
    return model, rule.optimizers(model, settings, seed, steps)


@torch.no_grad()
def deepen(model: ByteLM, depth: int) -> None:
    """Give a model of one block `depth` of them, where the model is: copies whose matrices are rolled by different
    numbers of rows and columns, so that no two blocks start with the same weight in the same place. That takes no time
    beside drawing them. Optimizers are to be made afterwards."""
    first = model.blocks[0]
    for number in range(1, depth):
        block = copy.deepcopy(first)
        for parameter in block.parameters():
            _roll(parameter, number)
        model.blocks.append(block)
    model.config = replace(model.config, depth=depth)


def _roll(parameter: nn.Parameter, number: int) -> None:
    rows, columns = parameter.shape
    parameter.copy_(parameter.roll((number * 37 % rows, number * 101 % columns), (0, 1)))
