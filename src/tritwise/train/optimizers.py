"""From a config to optimizers: the register rule for ternary weights, AdamW or Muon for the float baselines."""

from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import nn

from tritwise.models import Arb, ByteLM, ModelConfig
from tritwise.nn import ROLES, tensor_roles
from tritwise.optim import ROLE_RATES, Muon, TritOptimizer
from tritwise.train.config import TrainConfig


def build_optimizers(model: ByteLM | Arb, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """The optimizers that `config` asks for, each group with its rate in "initial_lr".

    Tensors are put into groups by the role that their layer declares, never by name.
    """
    factors = {"embedding": config.embedding_rate, "head": config.head_rate}
    if config.optimizer == "trit":
        rates = {role: config.rate * (factor or ROLE_RATES[role]) for role, factor in factors.items()}
        optimizers: list[torch.optim.Optimizer] = [
            TritOptimizer(
                model,
                rate=config.rate,
                momentum=config.momentum,
                scale_rate=config.scale_rate,
                direction=config.direction,
                nesterov=config.nesterov,
                row_memory=config.row_memory,
                interval=config.interval or _affordable_interval(model.config, config),
                compact=config.compact,
                roles={role: {"rate": rate, "interval": 1} for role, rate in rates.items()},
                seed=config.seed,
            )
        ]
    else:
        optimizers = float_optimizers(
            model,
            config.optimizer,
            config.rate,
            beta1=config.momentum if config.optimizer == "adamw" else 0.9,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            factors={role: factor or 1.0 for role, factor in factors.items()},
        )
    keep_initial_rates(optimizers)
    return optimizers


def _affordable_interval(shape: ModelConfig, config: TrainConfig) -> int:
    """How rarely matrices must move for the directions to cost about a seventh of forward and backward: 1 … 8.

    Three Newton-Schulz steps take about 15 * width operations a weight, and a matrix costs about as much as 35 million
    operations before the first of them, in calls: that is what counts at small widths. Forward and backward take 6
    operations a weight and byte. Moving every 4th step by 4 times the rate was measured no worse than moving at every
    step, every 8th worse by .005 nats (docs/LOG.md).
    """
    if config.direction not in ("newton_schulz", "balanced"):
        return 1
    work = 6 * config.batch * config.accum * shape.ctx
    direction = 15 * shape.width + 35e6 / (3 * shape.width**2)  # a block's mean matrix holds 3 * width^2 weights
    return max(1, min(8, round(direction / (0.15 * work))))


def float_groups(
    model: nn.Module,
    rate: float,
    factors: dict[str, float] | None = None,
    roles: Container[str] = ROLES,
    *,
    by_blocks: bool = False,
) -> list[dict[str, Any]]:
    """One group {"params", "lr", "role"} for each role among `roles` that has float parameters to train.

    factors: role -> what its rate is multiplied by; 1 where it names none. by_blocks: a group holds only layers with
    the same number of matrices in their rows, which it names as "blocks".
    """
    declared = tensor_roles(model)
    found: dict[tuple[str, int], list[nn.Parameter]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            role = declared[f"{prefix}.{name}" if prefix else name]
            if parameter.requires_grad and role in roles:
                found.setdefault((role, getattr(module, "blocks", 1) if by_blocks else 1), []).append(parameter)
    factors = factors or {}
    return [
        {"params": members, "lr": rate * factors.get(role, 1.0), "role": role}
        | ({"blocks": blocks} if by_blocks else {})
        for (role, blocks), members in found.items()
    ]


def float_optimizers(
    model: nn.Module,
    kind: str,
    rate: float,
    *,
    beta1: float = 0.9,
    beta2: float = 0.95,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    factors: dict[str, float] | None = None,
) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for matrices with AdamW for the rest, over every float parameter of `model` that trains.

    kind: "adamw" or "muon". beta1, beta2: of AdamW. momentum: of Muon. factors: as in `float_groups`.
    """
    adam: dict[str, Any] = {"betas": (beta1, beta2), "weight_decay": weight_decay, "fused": True}
    if kind == "adamw":
        return [torch.optim.AdamW(float_groups(model, rate, factors), **adam)]
    # Muon is for matrices; tables and the head get AdamW at a tenth of Muon's rate, which suits its unit steps.
    others = float_groups(model, 0.1 * rate, factors, [role for role in ROLES if role != "matrix"])
    matrices = float_groups(model, rate, factors, ["matrix"], by_blocks=True)
    muon = Muon(matrices, lr=rate, momentum=momentum, weight_decay=weight_decay)
    return [muon, torch.optim.AdamW(others, **adam)]


def keep_initial_rates(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Write down every group's rate as its "initial_lr", which `set_rates` multiplies."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]


def set_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Every group's rate becomes its initial rate times `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


def set_momentum(optimizers: list[torch.optim.Optimizer], momentum: float) -> None:
    """The momentum of ternary and Muon's groups becomes this one; Adam's betas stay."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if "momentum" in group:
                group["momentum"] = momentum
