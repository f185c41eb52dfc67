"""Muon for float matrices: the baseline whose direction the register rule shares.

Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tritwise.ops.direction.reference import newton_schulz


class Muon(torch.optim.Optimizer):
    """Momentum, then Newton-Schulz, then w -= lr * sqrt(max(1, rows/cols)) * direction. For 2-d float parameters only.

    lr: step in units of the direction's spectral norm. momentum: Nesterov coefficient. steps: Newton-Schulz steps.
    weight_decay: decoupled. State: one float32 momentum per weight (4 bytes a weight).
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        momentum: float = 0.95,
        steps: int = 5,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "steps": steps, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"Muon moves matrices, not a tensor of shape {tuple(p.shape)}; give it to AdamW")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update from the gradients in `.grad`; parameters without one are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                mean = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = newton_schulz(p.grad.lerp(mean, group["momentum"]), group["steps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)
        return loss
