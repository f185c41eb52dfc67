"""Sign-based float optimizers of the baselines. AdamW is torch's own; Muon is in `tritwise.optim`.

State has the parameter's dtype: parameters in bfloat16 make a run in bfloat16 throughout, as some of the seeds' rows
are. A bfloat16 number has 8 bits, so a step below 1/512 of a weight is rounded away: part of what the grid shows.
"""

# pyright: reportPrivateImportUsage=false
# torch's own optimizers are built on torch._foreach_*; there is no public name for them.

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Params = Iterable[Tensor] | Iterable[dict[str, Any]]


class _Foreach(torch.optim.Optimizer):
    """A step for each group over lists of tensors: a few launches, however many tensors there are."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the gradients in `.grad`; parameters without one are left alone. Returns closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, [p.grad for p in params], group)
        return loss

    def _update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _momenta(self, params: list[Tensor]) -> list[Tensor]:
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        return [self.state[p]["momentum"] for p in params]


def _descend(params: list[Tensor], signs: list[Tensor], group: dict[str, Any]) -> None:
    """w <- (1 - lr * weight_decay) w - lr * sign."""
    if group["weight_decay"]:
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
    torch._foreach_add_(params, signs, alpha=-group["lr"])


class SignSGD(_Foreach):
    """w <- w - lr * sign(g), or of the momentum m <- momentum * m + (1 - momentum) * g (Bernstein et al. 2018).

    lr: what every weight moves by. weight_decay: decoupled. State: none without momentum, but the weight itself is a
    float: it is the latent copy that the seeds did not count.
    """

    def __init__(self, params: Params, lr: float = 1e-3, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        if group["momentum"]:
            momenta = self._momenta(params)
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            grads = momenta
        _descend(params, torch._foreach_sign(grads), group)  # type: ignore[arg-type]


class Lion(_Foreach):
    """w <- w - lr * sign(b1 * m + (1 - b1) * g), then m <- b2 * m + (1 - b2) * g (Chen et al. 2023).

    lr: what every weight moves by; a third to a tenth of AdamW's. weight_decay: decoupled. State: m.
    """

    def __init__(
        self, params: Params, lr: float = 3e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def _update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        first, second = group["betas"]
        momenta = self._momenta(params)
        signs = torch._foreach_lerp(momenta, grads, 1 - first)
        torch._foreach_sign_(signs)
        _descend(params, signs, group)  # type: ignore[arg-type]
        torch._foreach_lerp_(momenta, grads, 1 - second)
