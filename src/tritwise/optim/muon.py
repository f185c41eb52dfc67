"""Muon for float matrices: the baseline whose direction the register rule shares.

Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
"""

# pyright: reportPrivateImportUsage=false
# torch's own optimizers are built on torch._foreach_*; there is no public name for them.

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tritwise.ops.direction.reference import newton_schulz


class Muon(torch.optim.Optimizer):
    """Momentum, then Newton-Schulz, then w -= lr * sqrt(max(1, rows/cols)) * direction. For 2-d float parameters only.

    lr: step in units of the direction's spectral norm. momentum: Nesterov coefficient. steps: Newton-Schulz steps.
    weight_decay: decoupled. blocks: the rows of a parameter are this many matrices one above the other (query, key and
    value: 3), each given its own direction. State: one momentum per weight in the parameter's dtype (float32: 4 bytes).
    Matrices of one shape go through Newton-Schulz together.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        momentum: float = 0.95,
        steps: int = 5,
        weight_decay: float = 0.0,
        blocks: int = 1,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "steps": steps, "weight_decay": weight_decay, "blocks": blocks}
        super().__init__(params, defaults)
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"Muon moves matrices, not a tensor of shape {tuple(p.shape)}; give it to AdamW")
                if group["blocks"] < 1 or p.shape[0] % group["blocks"]:
                    raise ValueError(
                        f"{p.shape[0]} rows do not divide into {group['blocks']} blocks; set the group's blocks"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update from the gradients in `.grad`; parameters without one are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        grads, means = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(means, grads, 1 - group["momentum"])  # type: ignore[arg-type]
        ahead = torch._foreach_lerp(grads, means, group["momentum"])  # type: ignore[arg-type]
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        alike: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
        for index, p in enumerate(params):
            alike.setdefault((p.shape, p.dtype), []).append(index)
        for (shape, dtype), indices in alike.items():
            rows, columns = shape[0] // group["blocks"], shape[1]
            stack_NRC = torch.cat([ahead[index].reshape(-1, rows, columns) for index in indices])
            turned_NRC = _orthogonal(stack_NRC, group["steps"]).to(dtype)
            updates = turned_NRC.reshape(len(indices), *shape).contiguous().unbind()
            rate = group["lr"] * max(1.0, rows / columns) ** 0.5
            torch._foreach_add_([params[index] for index in indices], updates, alpha=-rate)


def _orthogonal(stack_NRC: Tensor, steps: int) -> Tensor:
    """The directions of a stack of matrices: in bfloat16 on a GPU, as is usual, else in float32."""
    if not stack_NRC.is_cuda:
        return newton_schulz(stack_NRC.float(), steps)
    return newton_schulz(stack_NRC.bfloat16(), steps, through_gram=steps <= 3)
