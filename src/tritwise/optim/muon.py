"""Muon for float matrices: the baseline whose direction the register rule shares.

Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
"""

# pyright: reportPrivateImportUsage=false
# torch's own optimizers are built on torch._foreach_*; there is no public name for them.

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritwise.ops.direction.reference import newton_schulz
from tritwise.optim.moves import RecordedMoves


class _Stack(NamedTuple):
    """Matrices of one shape [N, R, C], whose directions move `params` by `rate`; a parameter has one or more."""

    params: list[Tensor]
    matrices_NRC: Tensor
    rate: float
    steps: int


class Muon(torch.optim.Optimizer):
    """Momentum, then Newton-Schulz, then w -= lr * sqrt(max(1, rows/cols)) * direction. For 2-d float parameters only.

    lr: step in units of the direction's spectral norm. momentum: Nesterov coefficient. steps: Newton-Schulz steps.
    weight_decay: decoupled. blocks: the rows of a parameter are this many matrices one above the other (query, key and
    value: 3), each given its own direction. State: one momentum per weight in the parameter's dtype (float32: 4 bytes).
    Matrices of one shape go through Newton-Schulz together.

    Attributes, to be set:
    records_moves: on a GPU what follows the momentum is recorded once as a CUDA graph and replayed, with the same bits.
        Its hundreds of launches take longer than they run where matrices are small. What is computed in between then
        stays allocated, some 10 bytes a weight. False at first.
    found_inf: as of torch's fused optimizers, float32 0-d where the parameters are: where it is 1 a step leaves every
        bit as it was, and no host has to know. None at first: gradients are taken to be numbers.
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
        self.records_moves = False
        self.found_inf: Tensor | None = None
        self._moves: RecordedMoves | None = None
        self._kept: dict[tuple[int, ...], tuple[list[Tensor], Tensor]] = {}  # what recordings read
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
        stacks = [stack for group in self.param_groups for stack in self._stacks(group)]
        if self.records_moves and stacks and _lies_on_a_gpu(stacks):
            self._replay(stacks)
        else:
            _move(stacks, [self._held(-stack.rate, 0.0) for stack in stacks])
        return loss

    def _stacks(self, group: dict[str, Any]) -> list[_Stack]:
        """The momenta of a group's matrices after this step's gradients, with Nesterov's look ahead."""
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return []
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        grads, means = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
        if self.found_inf is not None:  # a mean that meets itself stays
            grads = [torch.where(self.found_inf > 0, m, g) for g, m in zip(grads, means, strict=True)]  # type: ignore[arg-type]
        torch._foreach_lerp_(means, grads, 1 - group["momentum"])  # type: ignore[arg-type]
        ahead = torch._foreach_lerp(grads, means, group["momentum"])  # type: ignore[arg-type]
        if group["weight_decay"]:
            torch._foreach_mul_(params, self._held(1 - group["lr"] * group["weight_decay"], 1.0))
        alike: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
        for index, p in enumerate(params):
            alike.setdefault((p.shape, p.dtype), []).append(index)
        stacks = []
        for (shape, _), indices in alike.items():
            rows, columns = shape[0] // group["blocks"], shape[1]
            stack_NRC = torch.cat([ahead[index].reshape(-1, rows, columns) for index in indices])
            # In bfloat16 on a GPU, as is usual.
            stack_NRC = stack_NRC.to(torch.bfloat16 if stack_NRC.is_cuda else torch.float32)
            rate = group["lr"] * max(1.0, rows / columns) ** 0.5
            stacks.append(_Stack([params[index] for index in indices], stack_NRC, rate, group["steps"]))
        return stacks

    def _held(self, number: float, instead: float) -> float | Tensor:
        """`number`, or where this step is held back the other one; float32 0-d, if the device alone knows."""
        if self.found_inf is None:
            return number
        return torch.where(self.found_inf > 0, instead, torch.full_like(self.found_inf, number))

    def _replay(self, stacks: list[_Stack]) -> None:
        """`_move` out of a recording, the second time that it is asked for the same parameters."""
        key = (*(p.data_ptr() for stack in stacks for p in stack.params), *(stack.steps for stack in stacks))
        device = stacks[0].matrices_NRC.device
        if self._moves is None:
            self._moves = RecordedMoves(device)
        if key not in self._kept:
            lie = [torch.empty_like(stack.matrices_NRC) for stack in stacks]
            self._kept[key] = lie, torch.empty(len(stacks), device=device)
        lie, told = self._kept[key]
        torch._foreach_copy_(lie, [stack.matrices_NRC for stack in stacks])
        still = [stack._replace(matrices_NRC=where) for stack, where in zip(stacks, lie, strict=True)]

        go = torch.ones((), dtype=torch.bool, device=device) if self.found_inf is None else self.found_inf == 0

        def move(go: Tensor) -> dict[Any, Tensor]:
            _move(still, (told * go).unbind())
            return {}

        def tell() -> None:
            rates = torch.tensor([-stack.rate for stack in stacks], pin_memory=told.is_cuda)
            told.copy_(rates, non_blocking=True)

        self._moves.make(key, 0, go, move, nullcontext, tell)


def _lies_on_a_gpu(stacks: Sequence[_Stack]) -> bool:
    return all(stack.matrices_NRC.is_cuda for stack in stacks)


def _move(stacks: Sequence[_Stack], rates: Sequence[float | Tensor]) -> None:
    """Add the directions of all stacks, times their rates, numbers or float32 0-d tensors, to the parameters."""
    for stack, rate in zip(stacks, rates, strict=True):
        turned_NRC = _orthogonal(stack.matrices_NRC, stack.steps)
        updates_NRC = turned_NRC.to(stack.params[0].dtype) * rate
        shape = (len(stack.params), *stack.params[0].shape)
        torch._foreach_add_(stack.params, updates_NRC.reshape(shape).contiguous().unbind())


def _orthogonal(stack_NRC: Tensor, steps: int) -> Tensor:
    """The directions of a stack of matrices, of its type. In bfloat16 more than three steps lose too much to go through
    the Gram matrix."""
    return newton_schulz(stack_NRC, steps, through_gram=stack_NRC.dtype != torch.bfloat16 or steps <= 3)
