"""From a config to optimizers: the register rule for ternary weights, AdamW or Muon for the float baselines."""

from typing import Any

import torch
from torch import nn

from tritwise.models import ByteLM, ModelConfig
from tritwise.nn import tensor_roles
from tritwise.optim import Muon, TritOptimizer
from tritwise.train.config import TrainConfig


def build_optimizers(model: ByteLM, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """The optimizers that `config` asks for, each group with its rate in "initial_lr".

    Tensors are put into groups by the role that their layer declares, never by name.
    """
    if config.optimizer == "trit":
        optimizers: list[torch.optim.Optimizer] = [
            TritOptimizer(
                model,
                rate=config.rate,
                momentum=config.momentum,
                scale_rate=config.scale_rate,
                direction=config.direction,
                interval=config.interval or _affordable_interval(model.config, config),
                roles={
                    "embedding": {"rate": config.rate * config.embedding_rate, "interval": 1},
                    "head": {"rate": config.rate * config.head_rate, "interval": 1},
                },
                seed=config.seed,
            )
        ]
    else:
        optimizers = _float_optimizers(model, config)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def _affordable_interval(shape: ModelConfig, config: TrainConfig) -> int:
    """How rarely matrices must move for the directions to cost about a seventh of forward and backward: 1 … 8.

    Three Newton-Schulz steps take about 15 * width operations a weight, and a matrix costs about as much as 35 million
    operations before the first of them, in calls: that is what counts at small widths. Forward and backward take 6
    operations a weight and byte. Moving every 4th step by 4 times the rate was measured no worse than moving at every
    step, every 8th worse by .005 nats (docs/LOG.md).
    """
    if config.direction != "newton_schulz":
        return 1
    work = 6 * config.batch * config.accum * shape.ctx
    direction = 15 * shape.width + 35e6 / (3 * shape.width**2)  # a block's mean matrix holds 3 * width^2 weights
    return max(1, min(8, round(direction / (0.15 * work))))


def _float_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    roles = tensor_roles(model)
    by_role: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        by_role.setdefault(roles[name], []).append(parameter)
    factor = {"embedding": config.embedding_rate, "head": config.head_rate}
    adam: dict[str, Any] = {
        "betas": (config.momentum, 0.95),
        "weight_decay": config.weight_decay,
        "fused": True,
    }
    if config.optimizer == "adamw":
        groups = [{"params": p, "lr": config.rate * factor.get(role, 1.0)} for role, p in by_role.items()]
        return [torch.optim.AdamW(groups, **adam)]
    # Muon is for matrices; tables and the head get AdamW at a tenth of Muon's rate, which suits its unit steps.
    others = [
        {"params": p, "lr": 0.1 * config.rate * factor.get(role, 1.0)}
        for role, p in by_role.items()
        if role != "matrix"
    ]
    muon = Muon(by_role["matrix"], lr=config.rate, momentum=config.momentum, weight_decay=config.weight_decay)
    return [muon, torch.optim.AdamW(others, **adam)]


def set_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Every group's rate becomes its initial rate times `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
