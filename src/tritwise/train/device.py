"""What a run computes with: the device, the type of activations, compiled or not, and batches on their way there."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritwise.data.sampler import Sampler
from tritwise.errors import UserError
from tritwise.models import Arb, ByteLM
from tritwise.nn import trit_modules, use_fp8
from tritwise.ops import gpu
from tritwise.optim import Muon, TritOptimizer
from tritwise.train.config import Config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SMALL = 0.01  # share of a GPU's memory that all weight gradients of a small model may take at once


def device_called(name: str, option: str = "--set device=cpu") -> torch.device:
    """auto, cpu or cuda as a device. Raises UserError for another word, and for cuda where there is none, which names
    `option` as the way out."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"there is no device {name!r}; choose auto, cpu or cuda")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device cuda was asked for but torch sees no GPU; use {option}")
    return torch.device(name)


def dtype_called(name: str, device: torch.device) -> torch.dtype:
    """The type of activations: one of DTYPES; for auto bfloat16 on a GPU that computes in it, float32 elsewhere."""
    if name != "auto":
        return DTYPES[name]
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if able else torch.float32


def build_model(config: Config, device: torch.device) -> ByteLM | Arb:
    """The model of a run on `device`, new, with its type of activations and its ways to save memory."""
    settings = config.train
    dtype = dtype_called(settings.dtype, device)
    savings: dict[str, Any] = {"checkpoint": settings.checkpoint == "block", "loss_chunk": settings.loss_chunk}
    if config.media.task:
        return Arb(config.model, config.parts, dtype, **savings).to(device)
    return ByteLM(config.model, dtype, **savings).to(device)


def round_products(model: ByteLM | Arb) -> int:
    """`use_fp8`, for a run. Raises UserError where it cannot."""
    try:
        return use_fp8(model)
    except ValueError as error:
        raise UserError(str(error)) from None


class Speed(NamedTuple):
    """How steps run: `compile`, `graph` and `blocks` as `Stepper` takes them."""

    compile: bool
    graph: bool
    blocks: bool = False


def speed_of(compile: str, model: ByteLM | Arb, accum: int = 1) -> Speed:
    """How to run the steps of `model` where it is now. compile: true, blocks, false, graph, or auto: on a GPU that can.

    A recording pays for small models, whose kernels are shorter than the calls that start them. Its gradients wait in
    memory all at once, so all of them, in float32, must be small beside the GPU. It writes the gradients of float
    weights anew at every replay, so they cannot be added up over micro-batches.
    """
    device = next(model.parameters()).device
    able = device.type == "cuda" and gpu.refuses(device) is None
    whole, blocks = compile == "true" or (compile == "auto" and able), compile == "blocks"
    if device.type != "cuda" or not (whole or blocks or (compile == "graph" and able)):
        return Speed(whole, graph=False, blocks=blocks)
    numbers = sum(layer.register.numel() for _, layer in trit_modules(model))
    floats = sum(p.numel() for p in model.parameters() if p.requires_grad)
    small = 4 * (numbers + floats) <= SMALL * torch.cuda.get_device_properties(device).total_memory
    return Speed(whole, graph=small and (accum == 1 or not floats), blocks=blocks)


RECORDED = 1 << 32
"""Weights at most whose moves are recorded. From Python their launches take longer than they run up to half a billion
weights, and a third longer at a billion; above this, the memory that a recording keeps is better spent."""


RECORDED_FLOATS = 1 << 28
"""The same for Muon, whose recording keeps more for each."""


def record_moves(optimizers: Iterable[torch.optim.Optimizer], compiled: bool) -> None:
    """Let ternary optimizers and Muon record their moves where the steps that they take are compiled and their weights
    are not too many. Where whole steps are recorded, or away from a GPU, it makes no difference."""
    for optimizer in optimizers:
        if isinstance(optimizer, TritOptimizer):
            weights = sum(layer.register.numel() for layer in optimizer.layers)
            optimizer.records_moves = compiled and weights <= RECORDED
        elif isinstance(optimizer, Muon):
            weights = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
            optimizer.records_moves = compiled and weights <= RECORDED_FLOATS


def batch_on(device: torch.device, sampler: Sampler, step: int, micro: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and targets of one micro-batch, int64 [B, T] each, on `device`, without waiting for it."""
    ids, targets = sampler.batch_at(step, micro)
    if device.type == "cuda":
        return ids.pin_memory().to(device, non_blocking=True), targets.pin_memory().to(device, non_blocking=True)
    return ids, targets


def wait_for(device: torch.device) -> None:
    """Let a GPU finish what it was given, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Pace:
    """Keeps a host from running far ahead of its GPU, so that a clock on the host tells the GPU's time to a step."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, None

    def keep(self) -> None:
        """Called after each step: waits until the step before it is done. On a CPU it always is."""
        if self._device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
            if self._before is not None:
                self._before.synchronize()
            self._before = done
